"""Rows: what a measurement leaves behind, in files and on the screen."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from . import machine

if TYPE_CHECKING:
    from .harness import Case, Provider
    from .timing import Time

COLUMNS = (
    *("op", "provider", "mode", "shape", "N", "K", "P", "S", "dtype", "threads", "check"),
    *("ms_q50", "ms_q20", "ms_q80", "rounds", "gb_s", "tflop_s", "pct_copy", "pct_stream", "ratio"),
    *("peak_mb", "host_us"),
    *("malloc", "device", "driver", "torch", "triton", "commit", "date"),
)
Row = dict[str, Any]


def row(case: Case, provider: Provider, check: str, peak: float | None, times: list[Time]) -> Row:
    """One provider's row of a case; no ``times`` when it failed."""
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
        "peak_mb": "" if peak is None else f"{peak:.4g}" if peak < 1000 else f"{peak:.0f}",
        **machine.identity(case.device),
    }
    if times:
        device = [time.ms for time in times]
        low, middle, high = (quantile(device, q) for q in (0.2, 0.5, 0.8))
        row |= {"ms_q50": middle, "ms_q20": low, "ms_q80": high, "rounds": len(times)}
        traffic = case.traffic if provider.traffic is None else provider.traffic
        flops = provider.flops if provider.side == "ceiling" else case.flops
        row["gb_s"] = traffic / middle / 1e6 if traffic else ""
        row["tflop_s"] = f"{flops / middle / 1e9:.4g}" if flops else ""
        host = [time.host_us for time in times if time.host_us is not None]
        row["host_us"] = f"{quantile(host, 0.5):.4g}" if host else ""
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


def refusals(rows: Iterable[Row]) -> list[str]:
    """One sentence for every provider that a ratio would be unfair to: its result is wrong."""
    return [
        f"no speed-up is given against {row['provider']}: {row['check']}"
        for row in rows
        if not _correct(row)
    ]


_SHOWN = {
    "ms_q50": "ms",
    "spread": "20-80 %",
    "gb_s": "GB/s",
    "tflop_s": "TFLOP/s",
    "pct_copy": "% copy",
    "pct_stream": "% stream",
    "peak_mb": "peak MB",
    "host_us": "host µs",
    "ratio": "ratio",
}


def table(title: str, rows: Sequence[Row]) -> Table:
    """The rows of one case, for the screen; columns that none of them fills are left out."""
    cells = [
        {column: _short(row[column]) for column in _SHOWN if column in row}
        | {"spread": "-".join(_short(row[q]) for q in ("ms_q20", "ms_q80") if row[q])}
        for row in rows
    ]
    columns = [column for column in _SHOWN if any(cell[column] for cell in cells)]
    shown = Table(title=title, title_justify="left")
    shown.add_column("provider", no_wrap=True)
    for column in columns:
        shown.add_column(_SHOWN[column], justify="right")
    shown.add_column("check")
    for row, cell in zip(rows, cells, strict=True):
        style = "bold" if row["provider"].startswith("neulig_fast") else None
        check = row["check"].partition(":")[0]
        shown.add_row(row["provider"], *(cell[column] for column in columns), check, style=style)
    return shown


def _short(number: str) -> str:
    """A column's text with three digits."""
    if not number:
        return ""
    value = float(number)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replace the file as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append(path: Path, rows: list[Row], new: list[Row]) -> None:
    """Add ``new`` to ``rows`` and write them all."""
    rows.extend(new)
    write(path, rows)


def read(path: Path) -> list[Row]:
    """The rows of one file, all values as text; "" for columns that the file is too old to have."""
    with path.open(newline="") as file:
        return [dict.fromkeys(COLUMNS, "") | row for row in csv.DictReader(file)]
