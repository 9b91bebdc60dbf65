"""What ``neulig-fast bench`` does: check the request, measure the machine, then op after op."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from .. import benchmarks
from . import harness, machine, rows
from .harness import console
from .rows import Row
from .selection import Selection
from .shapes import SHAPES

DTYPES = {
    **{name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")},
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def _cases(op: str, device: str, quick: bool) -> Iterator[harness.Case]:
    module = importlib.import_module(f"{benchmarks.__name__}.bench_{op}")
    return module.cases(device, quick)


def chosen_ops(asked: Sequence[str]) -> list[str]:
    """The ops in the order they are measured; all of them when none is asked for.

    Raises:
        ValueError: an op that has no benchmark.
    """
    known = [name for name in benchmarks.names() if name != "machine"]
    _refuse_unknown("op", [op for op in asked if op not in (*known, "machine")], known)
    return [op for op in known if not asked or op in asked]


def choose(
    ops: Sequence[str],
    device: str,
    *,
    shapes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    providers: Sequence[str] = (),
    quick: bool = False,
    full: bool = False,
) -> Selection:
    """The selection that these words mean.

    Raises:
        ValueError: a word that means nothing; the known ones are listed.
    """
    if quick and (shapes or full):
        raise ValueError("bench: --quick has its own toy sizes; leave out --shapes and --full")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench: no CUDA device here")
    _refuse_unknown("shape", [s for s in shapes if s not in SHAPES], SHAPES)
    _refuse_unknown("dtype", [d for d in dtypes if d not in DTYPES], DTYPES)
    if providers:
        known = {p.name for op in ops for c in _cases(op, device, True) for p in c.providers}
        known = sorted(name for name in known if not name.startswith("ceiling/"))
        lost = [p for p in providers if not any(p.lower() in name.lower() for name in known)]
        _refuse_unknown("provider", lost, known)
    return Selection(
        quick=quick,
        full=full,
        shapes=frozenset(shapes) or None,
        dtypes=frozenset(DTYPES[name] for name in dtypes) or None,
        providers=frozenset(providers) or None,
    )


def _refuse_unknown(what: str, unknown: Sequence[str], known: Sequence[str]) -> None:
    if unknown:
        words = ", ".join(map(repr, unknown))
        raise ValueError(f"bench: unknown {what} {words}; known: {', '.join(known)}")


def measure(ops: Sequence[str], device: str, selection: Selection) -> tuple[list[Row], bool]:
    """The machine's limits, then the ops: all rows, and whether Ctrl-C ended it early.

    A case that is interrupted leaves no rows; the finished ones are kept.
    """
    found: list[Row] = []
    limits = Selection(quick=selection.quick, dtypes=selection.dtypes)
    try:
        console.print(f"{machine.name(device)}: its limits first")
        harness.run(_cases("machine", device, selection.quick), limits, found.extend)
        for op in ops:
            before = len(found)
            harness.run(_cases(op, device, selection.quick), selection, found.extend)
            if len(found) == before:
                console.print(f"[yellow]{op}: nothing of what was asked for")
    except KeyboardInterrupt:
        return found, True
    return found, False


def write(found: list[Row], json_file: Path | None, figure: Path | None) -> None:
    """Rows in the columns of the committed files, one object each; a roofline of them."""
    if json_file is not None:
        ordered = [{column: row[column] for column in rows.COLUMNS} for row in found]
        json_file.write_text(json.dumps(ordered, indent=1) + "\n")
    if figure is not None and found:
        from .plot import roofline

        roofline(found, figure)
