"""Forcing and explaining backends: ``use_backend``, ``NEULIG_FAST_BACKEND``, ``show_backends``."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
from collections.abc import Mapping
from platform import python_version

import torch

from . import __version__, _native, _registry
from ._registry import BACKENDS, DEVICES, OPS, Op, log, no_device

VARIABLE = "NEULIG_FAST_BACKEND"
_lock = threading.Lock()


def _validated(choices: Mapping[str | None, str], origin: str) -> dict[str | None, str]:
    faults = []
    for op, backend in choices.items():
        if op is not None and op not in OPS:
            faults.append(f"unknown op {op!r} (known: {', '.join(sorted(OPS))})")
        elif backend not in BACKENDS:
            faults.append(f"unknown backend {backend!r} (known: {', '.join(BACKENDS)})")
        elif op is not None and backend not in OPS[op].impls:
            faults.append(f"{op} has no backend {backend!r} (it has: {', '.join(OPS[op].impls)})")
    if faults:
        raise ValueError(f"{origin}: " + "; ".join(faults))
    return dict(choices)


class use_backend(contextlib.ContextDecorator):
    """Force a backend for a block of code or a function.

    ``use_backend("triton")`` binds every op that offers it; ``use_backend(blend="torch")`` binds
    one. Forced and unable is a RuntimeError with the reason. The choice is global to the process,
    not to the thread: backward passes on CUDA run on autograd's own threads.

    Raises:
        ValueError: unknown op or backend, all of them listed.
    """

    def __init__(self, backend: str | None = None, /, **by_op: str) -> None:
        choices: dict[str | None, str] = dict(by_op.items())
        if backend is not None:
            choices[None] = backend
        self._choices = _validated(choices, "use_backend")

    def __enter__(self) -> use_backend:
        with _lock:
            _registry.forcing = (*_registry.forcing, self._choices)
        return self

    def __exit__(self, *exc: object) -> None:
        with _lock:
            kept = list(_registry.forcing)
            last = max(i for i, choices in enumerate(kept) if choices is self._choices)
            _registry.forcing = (*kept[:last], *kept[last + 1 :])


def read_environment() -> None:
    """Apply ``NEULIG_FAST_BACKEND`` (``triton`` or ``blend=triton,offset_gram=torch``)."""
    choices: dict[str | None, str] = {}
    for item in filter(None, os.environ.get(VARIABLE, "").replace(" ", "").split(",")):
        op, equals, backend = item.rpartition("=")
        key = op if equals else None
        if key in choices:
            raise ValueError(f"{VARIABLE}: {op or 'every op'} is given twice")
        choices[key] = backend
    if choices:
        _registry.forcing = (_validated(choices, VARIABLE), *_registry.forcing)
    if os.environ.get("NEULIG_FAST_LOG") == "dispatch":
        logging.basicConfig()
        log.setLevel(logging.DEBUG)


@dataclasses.dataclass(frozen=True)
class BackendStatus:
    """What runs for one op on one device type, and why the other backends do not."""

    op: str
    device: str
    runs: str | None
    reasons: Mapping[str, str | None]
    forced: str | None


def status(op: Op, device: str) -> BackendStatus:
    """What would run of ``op`` on ``device``, and why the other backends would not."""
    reasons = {backend: op.why_not(backend, device) for backend in BACKENDS}
    nothing = no_device(device)
    if nothing is not None:
        reasons = {backend: reason or nothing for backend, reason in reasons.items()}
        return BackendStatus(op.name, device, None, reasons, op.forced())
    forced = op.forced()
    candidates = op.order[device] if forced is None else (forced,)
    runs = next((b for b in candidates if reasons[b] is None), None)
    return BackendStatus(op.name, device, runs, reasons, forced)


def _line(row: BackendStatus, width: int) -> str:
    others = [
        f"{backend}: {row.reasons[backend] or 'ok'}"
        for backend in BACKENDS
        if backend != row.runs
        and (backend == row.forced or not (row.reasons[backend] or "").startswith("for "))
    ]
    forced = " (forced)" if row.forced else ""
    return f"{row.op:<{width}} {row.device:<7} {(row.runs or '-') + forced:<16} " + " · ".join(
        others
    )


def show_backends() -> list[BackendStatus]:
    """Print, and return, what runs for every op on every device type and why others do not."""
    rows = [status(OPS[name], device) for name in sorted(OPS) for device in DEVICES]
    variable = os.environ.get(VARIABLE)
    bound = (item for choices in _registry.forcing for item in choices.items())
    forced = ", ".join(f"{op or 'every op'}={backend}" for op, backend in bound)
    width = max(map(len, OPS))
    print(f"neulig_fast {__version__}, torch {torch.__version__}, Python {python_version()}")
    print(_native.describe())
    print(f"{'op':<{width}} {'device':<7} {'runs':<16} others")
    for row in rows:
        print(_line(row, width))
    print(f"forced: {forced or 'nothing'} · {VARIABLE} {variable or 'unset'}")
    return rows


# What is forced and explained is what is registered. Last, since ops reads the environment by the
# function above, whichever of the two is imported first.
from . import ops  # noqa: E402, F401
