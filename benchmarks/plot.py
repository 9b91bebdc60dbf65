"""Figures of rows: ``python -m neulig_fast.benchmarks.plot results/<device> --out FOLDER``."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .rows import Row, read
from .shapes import TOY

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


def roofline(rows: list[Row], path: Path) -> None:
    """Every right provider's rate over its case's flops per byte, under the machine's roofs.

    ``rows`` of one device; those of op ``machine`` are the roofs. Rates are the formula's
    operations over the time, so that no provider gains by computing more. Toy sizes, which show
    what a call costs, are left out where there are others.
    """
    points = [r for r in rows if r["tflop_s"] and r["gb_s"] and r["op"] != "machine"]
    points = [r for r in points if not r["check"].startswith("wrong")]
    points = [r for r in points if r["shape"] != TOY.name] or points
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    per_byte = [1e3 * float(r["tflop_s"]) / float(r["gb_s"]) for r in points]
    left, right = min(per_byte, default=0.1) / 4, max(per_byte, default=10) * 20
    heights = _roofs([r for r in rows if r["op"] == "machine"], axes, left, right)
    heights += [1e3 * float(r["tflop_s"]) for r in points]
    ops = sorted({r["op"] for r in points})
    styles = dict(zip(ops, itertools.cycle("osD^v<>pPX*hH8d"), strict=False))
    for row, x in zip(points, per_byte, strict=True):
        ours, y = row["provider"].startswith("neulig_fast"), 1e3 * float(row["tflop_s"])
        fill = _color(row["provider"]) if row["dtype"] == "float32" else "white"
        look = {"s": 42 if ours else 20, "zorder": 3 if ours else 2, "facecolor": fill}
        marker = styles[row["op"]]
        axes.scatter(x, y, edgecolor=_color(row["provider"]), marker=marker, **look)
    for op, marker in styles.items():
        axes.scatter([], [], color=THEIRS, marker=marker, label=op)
    for name, color in (("neulig_fast", OURS), ("its reference", REFERENCE), ("others", THEIRS)):
        axes.scatter([], [], color=color, marker="s", label=name)
    axes.scatter([], [], facecolor="white", edgecolor=THEIRS, label="hollow: not fp32")
    ylim = min(heights, default=0.1) / 3, max(heights, default=10) * 3
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=ylim)
    axes.set(xlabel="flops per byte of least traffic", ylabel="GFLOP/s")
    axes.set_title(rows[0]["device"] if rows else "", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    # The same rows give the same file.
    with plt.rc_context({"svg.hashsalt": "neulig_fast"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _roofs(limits: list[Row], axes: Axes, left: float, right: float) -> list[float]:
    """The slanted roofs of the memory and the flat ones of the arithmetic; the latter's heights."""
    flat = {r["dtype"]: 1e3 * float(r["tflop_s"]) for r in limits if r["tflop_s"]}
    for name in ("copy", "triad"):
        found = [float(r["gb_s"]) for r in limits if r["provider"].startswith(f"ceiling/{name}")]
        if found:
            speed = max(found)
            stop = min(right, max(flat.values(), default=speed * right) / speed)
            label = f"{name}: {speed:.4g} GB/s"
            ends = [left, stop], [left * speed, stop * speed]
            axes.plot(
                *ends, color=LIMIT, lw=1, linestyle="-" if name == "copy" else ":", label=label
            )
    for dtype, speed in flat.items():
        label = f"matrix product, {dtype}: {speed:.4g} GFLOP/s"
        axes.hlines(speed, left, right, color=LIMIT, lw=1, linestyle="--", label=label)
    return list(flat.values())


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
