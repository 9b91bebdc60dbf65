"""Forcing and explaining backends: ``use_backend``, ``NEULIG_FAST_BACKEND``, ``show_backends``."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping

from . import _native
from ._registry import BACKENDS, DEVICES, OPS, BackendStatus, forced_backends, log

VARIABLE = "NEULIG_FAST_BACKEND"


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
        self._saved: list[dict[str | None, str]] = []

    def __enter__(self) -> use_backend:
        self._saved.append(dict(forced_backends))
        forced_backends.update(self._choices)
        return self

    def __exit__(self, *exc: object) -> None:
        forced_backends.clear()
        forced_backends.update(self._saved.pop())


def read_environment() -> None:
    """Apply ``NEULIG_FAST_BACKEND`` (``triton`` or ``blend=triton,offset_gram=torch``)."""
    choices: dict[str | None, str] = {}
    for item in filter(None, os.environ.get(VARIABLE, "").replace(" ", "").split(",")):
        op, equals, backend = item.rpartition("=")
        choices[op if equals else None] = backend
    forced_backends.update(_validated(choices, VARIABLE))
    if os.environ.get("NEULIG_FAST_LOG") == "dispatch":
        logging.basicConfig()
        log.setLevel(logging.DEBUG)


def _line(row: BackendStatus) -> str:
    others = [
        f"{backend}: {row.reasons[backend] or 'ok'}"
        for backend in BACKENDS
        if backend != row.runs and not (row.reasons[backend] or "").startswith("for ")
    ]
    forced = " (forced)" if row.forced else ""
    return f"{row.op:<20} {row.device:<7} {(row.runs or '-') + forced:<16} " + " · ".join(others)


def show_backends() -> list[BackendStatus]:
    """Print, and return, what runs for every op on every device type and why others do not."""
    rows = [OPS[name].status(device) for name in sorted(OPS) for device in DEVICES]
    variable = os.environ.get(VARIABLE)
    forced = ", ".join(f"{op or 'every op'}={backend}" for op, backend in forced_backends.items())
    print(_native.describe())
    print(f"{'op':<20} {'device':<7} {'runs':<16} others")
    for row in rows:
        print(_line(row))
    print(f"forced: {forced or 'nothing'} · {VARIABLE} {variable or 'unset'}")
    return rows
