"""Figures of a report, drawn to be looked at: accuracy, CoopVecs, losses.

Colours are Okabe and Ito's, told apart with any kind of colour vision; marks differ in shape too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.style import context
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

if TYPE_CHECKING:
    from .report import Report

BLUE, ORANGE, GREY, INK = "#0072B2", "#D55E00", "#8A8A8A", "#222222"
TASK_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
LOOK = {  # group of a row -> colour, marker, filled
    "reference": (GREY, "s", False),
    "baseline": (GREY, "o", True),
    "ensemble": (BLUE, "D", True),
    "merged": (ORANGE, "o", True),
}
PANELS_PER_LINE = 6
STYLE = {
    "font.size": 9.5,
    "axes.edgecolor": "#BBBBBB",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": "#555555",
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
}


def plot(report: Report, folder: Path) -> list[Path]:
    """Draw every figure the report has data for into ``folder``; returns the PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with context(STYLE):
        drawings = {"accuracy": accuracy(report), "coopvecs": coopvecs(report)}
        if report.history is not None:
            drawings["losses"] = losses(report.history)
        for name, figure in drawings.items():
            path = folder / f"{name}.png"
            FigureCanvasAgg(figure)
            figure.savefig(path, dpi=160, bbox_inches="tight", pad_inches=0.15, facecolor="white")
            written.append(path)
    return written


def accuracy(report: Report) -> Figure:
    """One panel per task and one for the mean; one dot per row; a line where the ensemble is."""
    from .report import ROWS

    rows, columns = report.rows()[::-1], [*report.tasks, "mean"]
    down = -(-len(columns) // PANELS_PER_LINE)
    across = -(-len(columns) // down)
    height = 0.34 * len(rows) + 0.7
    figure = Figure(figsize=(2.2 + 1.75 * across, 0.7 + height * down), layout="constrained")
    axes = figure.subplots(down, across, sharey=True, sharex=True, squeeze=False).ravel()
    for axis, column in zip(axes, columns, strict=False):
        _accuracy_panel(axis, report, rows, column)
    for axis in axes[len(columns) :]:
        axis.set_visible(False)
    for axis in axes[::across]:
        axis.set_yticks(range(len(rows)), [ROWS[row].name for row in rows])
        for label, row in zip(axis.get_yticklabels(), rows, strict=True):
            label.set_color(_ink(ROWS[row].group))
            label.set_fontweight("bold" if ROWS[row].group == "ensemble" else "normal")
    figure.supxlabel(f"accuracy on the {report.settings['split']} split, %", fontsize=9.5)
    figure.suptitle(
        "Merged models against the ensemble (line)",
        x=0.01, ha="left", fontsize=12.5, fontweight="bold",
    )  # fmt: skip
    return figure


def _accuracy_panel(axis: Axes, report: Report, rows: Sequence[str], column: str) -> None:
    from .report import ROWS

    ensemble = report.accuracy["ensemble"][column]
    axis.axvline(ensemble, color=BLUE, lw=1.2, alpha=0.7, zorder=1)
    for y, row in enumerate(rows):
        value, group = report.accuracy[row][column], ROWS[row].group
        colour, marker, filled = LOOK[group]
        if group in ("merged", "baseline"):
            axis.plot([ensemble, value], [y, y], color=colour, lw=1.6, alpha=0.45, zorder=2)
        axis.plot(
            value, y, marker, color=colour, mfc=colour if filled else "white", ms=6, mew=1.3,
            zorder=3,
        )  # fmt: skip
        # Beside the dot, on the side away from the ensemble's line.
        left = (value <= ensemble and value > 18) or value > 88
        axis.annotate(
            f"{value:.1f}", (value, y), (-6 if left else 6, 0), textcoords="offset points",
            ha="right" if left else "left", va="center", fontsize=7.5, color=_ink(group),
        )  # fmt: skip
    axis.set_title(column, fontweight="bold" if column == "mean" else "normal")
    axis.set_xlim(-3, 104)
    axis.set_ylim(-0.7, len(rows) - 0.3)
    axis.set_xticks([0, 50, 100])
    axis.grid(axis="x", color="#EEEEEE", lw=0.8, zorder=0)
    axis.tick_params(length=0)
    if column == "mean":
        axis.set_facecolor("#F6F6F4")


def _ink(group: str) -> str:
    return {"ensemble": BLUE, "merged": "#A84800"}.get(group, "#555555")


_FRAME: dict[str, Any] = {"fill": False, "ec": ORANGE, "lw": 2.2, "zorder": 3, "clip_on": False}


def coopvecs(report: Report) -> Figure:
    """Mean CoopVec of each task's images; frames mark every task's own expert."""
    names = report.settings["experts"]
    weights = np.array([report.coopvec["tasks"][task]["mean"] for task in report.tasks])
    size = (2.6 + 0.85 * len(names), 1.9 + 0.55 * len(report.tasks))
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(weights, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(np.arange(len(names)) + 0.5, minor=True)
    axis.set_yticks(np.arange(len(report.tasks)) + 0.5, minor=True)
    axis.grid(which="minor", color="#E4E4E4", lw=1)
    for (y, x), weight in np.ndenumerate(weights):
        ink = "white" if weight > 0.55 else INK if weight >= 0.005 else "#AAAAAA"
        axis.text(x, y, f"{weight:.2f}", ha="center", va="center", color=ink, fontsize=9.5)
    own = report.settings.get("own") or {}
    for y, task in enumerate(report.tasks):
        if task in own:
            corner = (names.index(own[task]) - 0.5, y - 0.5)
            axis.add_patch(Rectangle(corner, 1, 1, **_FRAME))
    axis.set_xticks(range(len(names)), names)
    if max(map(len, names)) > 9:
        axis.tick_params(axis="x", labelrotation=25)
        for label in axis.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(report.tasks)), report.tasks)
    axis.set_xlabel("weight of expert" + (" (frame: the task's own)" if own else ""))
    axis.set_ylabel("images of task")
    axis.tick_params(length=0, which="both")
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, fraction=0.045, pad=0.03, ticks=[0, 0.5, 1])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    vectors = report.coopvec
    figure.suptitle("Mean CoopVec of each task", x=0.01, ha="left", fontsize=12.5, weight="bold")
    axis.set_title(
        f"per image: largest weight {vectors['max']:.2f}, entropy {abs(vectors['entropy']):.2f} "
        f"of at most {np.log(len(names)):.2f} nats",
        loc="left", fontsize=9.5,
    )  # fmt: skip
    return figure


def losses(history: dict[str, Any]) -> Figure:
    """Boosting and alignment term over steps: one line per task, a strong one for their mean."""
    tasks = history["tasks"]
    points = np.arange(len(history["boosting"])) + 0.5
    steps = points * history["rounds_per_point"] * len(tasks)
    figure = Figure(figsize=(8.2, 5.0), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    for axis, name in zip(panels, ("boosting", "alignment"), strict=True):
        values = np.array(history[name], dtype=float)
        for t, task in enumerate(tasks):
            colour = TASK_COLOURS[t % len(TASK_COLOURS)]
            axis.plot(steps, _running_mean(values[:, t]), color=colour, lw=1.2, label=task)
        axis.plot(steps, _running_mean(values.mean(1)), color=INK, lw=2.6, label="mean")
        if (values > 0).all():
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(f"{name} term", loc="left", fontweight="bold")
        axis.grid(color="#EEEEEE", lw=0.8)
        axis.tick_params(length=0, which="both")
        axis.margins(x=0.01)
    panels[-1].set_xlabel("training step")
    figure.supylabel("loss, mean over a batch", fontsize=9.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return figure


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over about 2 % of the points, over what there is at the ends."""
    width = max(1, len(values) // 50)
    kernel = np.ones(2 * (width // 2) + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
