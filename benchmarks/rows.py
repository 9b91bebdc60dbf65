"""Rows: what a measurement leaves behind, in files and on the screen."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import machine
from rich.table import Table

if TYPE_CHECKING:
    from harness import Case, Provider

COLUMNS = (
    *("op", "provider", "mode", "shape", "N", "K", "P", "S", "dtype", "threads", "check"),
    *("ms_q50", "ms_q20", "ms_q80", "rounds", "gb_s", "pct_copy", "pct_stream", "ratio", "peak_mb"),
    *("malloc", "device", "driver", "torch", "triton", "commit", "date"),
)
Row = dict[str, Any]


def row(case: Case, provider: Provider, check: str, peak: float | None, times: list[float]) -> Row:
    """One provider's row of a case; ``times`` in ms, none when it failed."""
    row: Row = dict.fromkeys(COLUMNS, "")
    row |= {
        "op": case.op,
        "provider": provider.name,
        "mode": f"{case.mode}, {provider.note}" if provider.note else case.mode,
        "shape": case.shape,
        **case.numbers,
        "dtype": str(case.dtype).removeprefix("torch."),
        "threads": case.threads if case.device == "cpu" else "",
        "check": check,
        "peak_mb": "" if peak is None else f"{peak:.0f}",
        **machine.identity(case.device),
    }
    if times:
        low, middle, high = (quantile(times, q) for q in (0.2, 0.5, 0.8))
        row |= {"ms_q50": middle, "ms_q20": low, "ms_q80": high, "rounds": len(times)}
        traffic = case.traffic if provider.traffic is None else provider.traffic
        row["gb_s"] = traffic / middle / 1e6 if traffic else ""
    return row


def quantile(values: list[float], q: float) -> float:
    """The q-quantile (q a multiple of 0.1), linear between order statistics."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=10, method="inclusive")[round(10 * q) - 1]


def compare(case: Case, rows: list[Row]) -> list[Row]:
    """``rows`` of one case with percentages of its ceilings and ratios, numbers as text."""
    side = {provider.name: provider.side for provider in case.providers}

    def best(prefix: str) -> float | None:
        found = [r["gb_s"] for r in rows if r["provider"].startswith(prefix) and r["gb_s"] != ""]
        return max(found, default=None)

    limits = {"pct_copy": best("ceiling/copy"), "pct_stream": best("ceiling/stream")}
    fair = [r for r in rows if side[r["provider"]] != "ceiling" and _correct(r)]
    for row in rows:
        for column, limit in limits.items():
            if limit and row["gb_s"] != "":
                row[column] = f"{100 * row['gb_s'] / limit:.1f}"
    for row in fair:
        others = (r for r in fair if side[r["provider"]] != side[row["provider"]])
        rivals = [r["ms_q50"] for r in others if r["ms_q50"] != ""]
        row["ratio"] = f"{min(rivals) / row['ms_q50']:.3g}" if rivals else ""
    for row in rows:
        for column in ("ms_q50", "ms_q20", "ms_q80", "gb_s"):
            row[column] = row[column] if row[column] == "" else f"{row[column]:.4g}"
    return rows


def _correct(row: Row) -> bool:
    return not row["check"].startswith(("wrong", "failed"))


def is_failure_of_ours(row: Row) -> bool:
    """Whether one of our own backends was wrong or failed."""
    return row["provider"].startswith("neulig_fast") and not _correct(row)


def table(title: str, rows: Iterable[Row]) -> Table:
    """The rows of one case, for the screen."""
    columns = ("ms_q50", "gb_s", "pct_copy", "pct_stream", "ratio")
    shown = Table(title=title, title_justify="left")
    shown.add_column("provider", no_wrap=True)
    for column in columns:
        shown.add_column(column, justify="right")
    shown.add_column("check")
    for row in rows:
        style = "bold" if row["provider"].startswith("neulig_fast") else None
        cells = (str(row[column]) for column in columns)
        shown.add_row(row["provider"], *cells, row["check"], style=style)
    return shown


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replace the file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[Row]:
    """The rows of one file, all values as text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
