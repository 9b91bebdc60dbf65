"""One way to say what was expected and what came, with every mismatch in one error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
STORED_DTYPES = (*FLOAT_DTYPES, *FP8_DTYPES)
STORED = "fp32, bf16, fp16, fp64, float8_e4m3fn or float8_e5m2"


def raise_all(subject: str, faults: Iterable[str], error: type[Exception] = ValueError) -> None:
    """Raise ``error`` naming every fault, one per line when there are several; else return."""
    faults = list(faults)
    if not faults:
        return
    if len(faults) == 1:
        raise error(f"{subject}: {faults[0]}")
    raise error(f"{subject}: {len(faults)} problems\n  - " + "\n  - ".join(faults))


def listed(names: Sequence[str], most: int = 3) -> str:
    """``"a, b, c and 29 more"``: names of which there may be thousands."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def one_line_each(faults: Iterable[tuple[str, str, str]]) -> list[str]:
    """Faults of tensors, (before, name, after) each: one line for all that differ in names only."""
    found: dict[tuple[str, str], list[str]] = {}
    for before, name, after in faults:
        found.setdefault((before, after), []).append(name)
    return [before + listed(names) + after for (before, after), names in found.items()]


def check_tensors(subject: str, **arguments: object) -> None:
    """TypeError naming every argument that is not a tensor."""
    found = []
    for name, argument in arguments.items():
        if not isinstance(argument, torch.Tensor):
            found.append(f"{name} must be a tensor, got {type(argument).__name__}")
    if found:
        raise_all(subject, found, TypeError)


def layout_faults(name: str, tensor: torch.Tensor) -> list[str]:
    """What is said of a tensor whose layout is not torch.strided, such as a sparse one."""
    if tensor.layout == torch.strided:
        return []
    return [f"{name} must be dense (torch.strided), got {tensor.layout}"]


def shape(of: torch.Tensor | tuple[int, ...]) -> str:
    """``(2, 3)``: how a shape is written in every message."""
    sizes = of.shape if isinstance(of, torch.Tensor) else of
    return "(" + ", ".join(str(int(n)) for n in sizes) + ("," if len(sizes) == 1 else "") + ")"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'epochs'?"``, or nothing when no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type sums are formed in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def device_fault(device: torch.device | str) -> str | None:
    """Why sums cannot be kept on a device; None where they can."""
    if torch.device(device).type == "meta":
        return f"{device} tensors hold no values"
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except TypeError:  # of MPS
        return f"{device} has no float64, in which sums are kept: use another device"
    return None


def usable_device(value: str) -> str:
    """The name of a device that is here; ``auto`` is ``cuda`` where there is one, else ``cpu``.

    Raises:
        ValueError: no such device.
    """
    if value == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", value):
        raise ValueError(f"must be auto, cpu, cuda, cuda:1 or xpu, got {value!r}")
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"there is no {value} here: {str(error).splitlines()[0]}") from error
    return value
