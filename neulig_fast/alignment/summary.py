"""An alignment in two short tables, and in numbers that JSON can hold."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table

from .result import Alignment
from .sweeps import mean


def node_values(alignment: Alignment) -> dict[str, float]:
    """The mean matched similarity per node of the matchings; empty if nothing was matched."""
    found = (values for values in reversed(alignment.values) if mean(values) == alignment.value)
    return next(found, {})


def as_json(alignment: Alignment) -> dict[str, Any]:
    """What was found, without the matchings: plain dicts, lists and numbers."""
    after = alignment.distances_after
    return {
        "experts": list(alignment.names),
        "match": alignment.match,
        "balance": alignment.balance,
        "converged": alignment.converged,
        "interrupted": alignment.interrupted,
        "value": alignment.value,
        "values": alignment.values,
        "squared_distances_before": alignment.distances_before.tolist(),
        "squared_distances_after": None if after is None else after.tolist(),
        "trace_before": alignment.trace_before,
        "trace_after": alignment.trace_after,
    }


def tables(alignment: Alignment) -> Group:
    """How alike the matched units are, and how far apart the experts were and are."""
    return Group(_similarities(alignment), "", _distances(alignment))


def _similarities(alignment: Alignment) -> Table:
    """One row per kind of node: those whose names differ in whole numbers only."""
    values = node_values(alignment)
    kinds: dict[str, list[str]] = {}
    for name in alignment.spec.nodes:
        parts = ("*" if part.isdecimal() else part for part in name.split("."))
        kinds.setdefault(".".join(parts), []).append(name)
    table = _table("nodes", "number", "units", "matched similarity")
    for kind, names in kinds.items():
        units = sum(alignment.spec.nodes[name].size for name in names)
        known = [values[name] for name in names if name in values]
        value = f"{sum(known) / len(known):.4f}" if known else "-"
        table.add_row(kind, str(len(names)), str(units), value)
    table.add_section()
    nodes = alignment.spec.nodes.values()
    total = f"{alignment.value:.4f}" if values else "-"
    table.add_row("all", str(len(nodes)), str(sum(node.size for node in nodes)), total)
    return table


def _distances(alignment: Alignment) -> Table:
    """Rows of the other experts, and tr G; a zip has no distances afterwards."""
    first, *others = alignment.names
    before, after = alignment.distances_before[0].tolist(), alignment.distances_after
    table = _table(f"squared distance to {first}", "as given", "aligned")
    for i, name in enumerate(others, start=1):
        aligned = "-" if after is None else f"{float(after[0, i]):.6g}"
        table.add_row(name, f"{before[i]:.6g}", aligned)
    table.add_section()
    trace = alignment.trace_after
    spread = "-" if trace is None else f"{trace:.6g}"
    table.add_row("tr G of all", f"{alignment.trace_before:.6g}", spread)
    return table


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table
