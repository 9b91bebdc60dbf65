"""Figures of committed rows: ``python benchmarks/plot.py results/<device> --out FOLDER``."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rows import Row, read

OURS, REFERENCE, THEIRS, LIMIT = "#c8452d", "#e5a99d", "#8a9ba8", "#2b3a42"


def _color(provider: str) -> str:
    if provider == "neulig_fast/torch":
        return REFERENCE
    return OURS if provider.startswith("neulig_fast") else THEIRS


def providers(rows: list[Row], title: str, path: Path) -> None:
    """Horizontal bars: the effective bandwidth of every provider of one case, and the copy."""
    bars = [r for r in rows if r["gb_s"] and not r["provider"].startswith("ceiling")]
    bars.sort(key=lambda r: float(r["gb_s"]))
    limits = [float(r["gb_s"]) for r in rows if r["provider"].startswith("ceiling/copy")]
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(bars) + 1.4), layout="constrained")
    labels = [r["provider"] + (" (wrong)" if r["check"].startswith("wrong") else "") for r in bars]
    drawn = axes.barh(
        labels, [float(r["gb_s"]) for r in bars], color=[_color(r["provider"]) for r in bars]
    )
    axes.bar_label(drawn, [f" {float(r['ms_q50']):.3g} ms" for r in bars], fontsize=8)
    if limits:
        axes.axvline(max(limits), color=LIMIT, linestyle="--", linewidth=1, label="measured copy")
        axes.legend(loc="lower right", frameon=False)
    axes.set_xlabel("effective GB/s: least traffic over time")
    axes.set_title(f"{title}\n{bars[0]['device']}", fontsize=10, loc="left")
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def over_experts(rows: list[Row], title: str, path: Path) -> None:
    """Lines: effective bandwidth over the number of experts; dashed, the best copy."""
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        name = "measured copy" if row["provider"].startswith("ceiling/copy") else row["provider"]
        if row["gb_s"] and not name.startswith("ceiling"):
            points, speed = lines.setdefault(name, {}), float(row["gb_s"])
            points[int(row["N"])] = max(speed, points.get(int(row["N"]), 0))
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for name in sorted(lines, key=lambda n: -max(lines[n].values())):
        style = {"lw": 1.2, "marker": "o", "ms": 3}
        if name.startswith("neulig_fast"):
            style |= {"lw": 2.4, "color": _color(name)}
        elif name == "measured copy":
            style |= {"linestyle": "--", "color": LIMIT, "marker": ""}
        axes.plot(*zip(*sorted(lines[name].items()), strict=True), label=name, **style)
    axes.set(xlabel="experts", ylabel="effective GB/s: least traffic over time")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{title}\n{rows[0]['device']}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path)
    plt.close(figure)


def plot(folder: Path, out: Path) -> list[Path]:
    """Every figure that the rows in ``folder`` allow; the files written."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for file in sorted(folder.glob("*.csv")):
        groups: dict[tuple[str, ...], list[Row]] = {}
        for row in read(file):
            mode = row["mode"].split(",")[0]
            key = (row["op"], mode, row["shape"], row["K"], row["S"], row["dtype"], row["threads"])
            groups.setdefault(key, []).append(row)
        for (op, mode, shape, K, S, dtype, threads), rows in groups.items():
            title = f"{op} {mode}, {shape}, {dtype}" + (f", {threads} threads" if threads else "")
            title += "".join(f", {k} = {v}" for k, v in (("K", K), ("S", S)) if v not in ("", "1"))
            counts = sorted({int(row["N"]) for row in rows})
            stem = "-".join([op, mode, dtype, f"K{K}", f"S{S}", f"{threads}t", shape])
            stem = stem.replace(" ", "_").replace("+", "_")
            if len(counts) > 2:
                written.append(out / f"{stem}-over-N.svg")
                over_experts(rows, title, written[-1])
            middle = 5 if 5 in counts else counts[-1]
            chosen = [row for row in rows if int(row["N"]) == middle]
            if any(row["gb_s"] for row in chosen):
                written.append(out / f"{stem}-N{middle}.svg")
                providers(chosen, f"{title}, N = {middle}", written[-1])
    return written


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Figures of benchmark rows.")
    parser.add_argument("folder", type=Path, help="benchmarks/results/<device>")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args()
    for path in plot(options.folder, options.out):
        print(path)
