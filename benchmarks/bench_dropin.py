"""Drop-ins: functions of other projects, as they are and under ``nf.patch``, in one run.

What is timed stands in dropins/, a file per project. A result must agree with the project's own,
and the replacement must have taken the call: one that was left to the original has failed. A
project that is not installed is left out in words.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import neulig_fast as nf
from neulig_fast import testing
from neulig_fast.compat import Patch

from . import dropins, harness, machine
from .harness import Case, Provider


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(result, Tensor):
        return [result]
    parts = result.values() if isinstance(result, dict) else result
    return [tensor for part in parts for tensor in tensors(part)]


def copied(result: Any) -> list[Tensor]:
    """The same, as they are now: some calls write into what they return."""
    return [tensor.detach().clone() for tensor in tensors(result)]


def agree(result: Any, expected: list[Tensor], terms: int) -> None:
    """AssertionError unless every tensor obeys the tolerance rule against the host's."""
    for got, wanted in zip(tensors(result), expected, strict=True):
        testing.assert_within_rule(got, wanted, wanted.double(), terms)


def replaces(case: dropins.Case, parity: str) -> bool:
    """Whether the function is replaced at a parity."""
    with nf.patch(case.host, parity) as patch:
        return case.seam in patch.seams


class Patched:
    """A call under the patch, which is entered around each repetition."""

    def __init__(self, case: dropins.Case, parity: str, call: Callable[[], Any] | None) -> None:
        self.case, self.parity = case, parity
        with self.within():
            self.call = call or case.make()

    def within(self) -> Patch:
        return nf.patch(self.case.host, self.parity)

    def __call__(self) -> Any:
        """The result; RuntimeError where the original had to compute it."""
        before = self._passed()
        result = self.call()
        if self._passed() != before:
            raise RuntimeError(f"left to the original: {self._passed()}")
        return result

    def _passed(self) -> dict[str, int]:
        patch = next(p for p in nf.patch.status() if p.name == self.case.host)
        return dict(patch.stats()[self.case.seam].passed)


def make_case(case: dropins.Case) -> Case | None:
    """The host and its replacements; None where no parity has one, or the host is not there."""
    try:
        parities = [parity for parity in case.parities if replaces(case, parity)]
    except ImportError as error:
        harness.say(f"{case.seam} left out: {error}")
        return None
    if not parities:
        return None
    shared = None if case.in_place else case.make()
    ours = [Patched(case, parity, shared) for parity in parities]
    expected = copied((shared or case.make())())

    def check(result: Any) -> None:
        if case.check is not None:
            case.check(result, expected)
        else:
            agree(result, expected, case.terms)

    return Case(
        op="dropin",
        mode=case.seam,
        shape=case.size,
        dtype=next((tensor.dtype for tensor in expected), torch.float32),
        device="cpu",
        threads=machine.cores(),
        providers=[
            *(Provider(f"neulig_fast/{p.parity}", p, "ours", within=p.within) for p in ours),
            Provider(case.host, shared or case.make()),
        ],
        check=check,
    )


def cases(device: str, quick: bool, host: str | None = None) -> Iterator[Case]:
    """Each made when it is asked for, and kept by nobody here: the next one needs its memory."""
    for name in dropins.hosts() if host is None else [host]:
        module = importlib.import_module(f"{dropins.__name__}.{name}")
        wanted = [case for case in module.CASES if (case.size == dropins.TOY) == quick]
        yield from filter(None, map(make_case, wanted if device == "cpu" else ()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--host", choices=dropins.hosts(), help="default: all")
    harness.main("dropin", cases, parser)
