"""Figures of the demonstration of alignment: the way from one expert to another, and a matching."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.style import context
from torch import Tensor

from ..neulig.figures import BLUE, GREY, ORANGE, STYLE

SHOWN = 48  # units of a node
LINES = {  # of one way to align -> colour, dashes, width
    "unaligned": (GREY, (4, 2), 1.6),
    "weights": ("#009E73", (1, 1.2), 1.8),
    "activations": (BLUE, (6, 1.5, 1.5, 1.5), 1.8),
    "both (MuDSC)": (ORANGE, (), 2.4),
}


def save(figure: Figure, path: Path) -> None:
    """Write a PNG in the house style."""
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.15, facecolor="white")


def barriers(groups: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Test loss on the straight way between two experts, a panel per group.

    Args:
        groups: title -> ``{"names": (A, B), "t": [...], "loss": {way to align: [...]}}``.
    """
    with context(STYLE):
        across = min(2, len(groups))
        down = -(-len(groups) // across)
        figure = Figure(figsize=(0.4 + 4.0 * across, 1.0 + 2.7 * down), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).ravel()
        for axis in panels[len(groups) :]:
            axis.set_visible(False)
        for axis, (title, curves) in zip(panels, groups.items(), strict=False):
            for name, losses in curves["loss"].items():
                colour, dashes, width = LINES[name]
                axis.plot(
                    curves["t"], losses, color=colour, dashes=dashes, lw=width, label=name,
                    marker="o", ms=3.2,
                )  # fmt: skip
            _barrier_axis(axis, title, curves["names"])
        figure.supylabel("test loss over all classes", fontsize=9.5)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=len(labels), frameon=False,
            title="second expert aligned by",
        )  # fmt: skip
        figure.suptitle(
            "From one expert to the other", x=0.01, ha="left", fontsize=12.5, fontweight="bold"
        )
        save(figure, path)


def _barrier_axis(axis: Axes, title: str, names: Sequence[str]) -> None:
    axis.set_title(title, loc="left")
    axis.set_xticks([0, 0.5, 1], [f"expert\n{names[0]}", "average", f"expert\n{names[1]}"])
    axis.set_ylim(bottom=0)
    axis.margins(x=0.04)
    axis.grid(color="#EEEEEE", lw=0.8)
    axis.tick_params(length=0)


def similarities(before: Tensor, order: Tensor, title: str, path: Path) -> None:
    """One node's similarity matrix with the second network's units as they are and as matched.

    Args:
        before: (n, n), units of the first network as rows.
        order: (n,), the second network's unit beside each of the first's.

    Of many units those that are matched best, the best first, so that the diagonal fades downwards.
    """
    matched = before[:, order]
    rows = matched.diagonal().argsort(descending=True)[:SHOWN]
    panels = {"as trained": before[rows][:, rows], "as matched": matched[rows][:, rows]}
    with context(STYLE):
        figure = Figure(figsize=(8.6, 4.3), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (name, matrix) in zip(axes, panels.items(), strict=True):
            image = axis.imshow(
                matrix.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest"
            )
            mean = f"{matrix.diagonal().mean().item():.2f}".replace("-", "−")
            axis.set_title(f"{name}: diagonal {mean} on average", loc="left")
            axis.set_xlabel("unit of the second expert")
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
        axes[0].set_ylabel("unit of the first expert, best matched first")
        bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, ticks=[-1, 0, 1])
        bar.outline.set_visible(False)
        bar.set_label("correlation of activations")
        shown = f"{title}, {len(rows)} of {len(before)} units"
        figure.suptitle(shown, x=0.01, ha="left", fontsize=12.5, fontweight="bold")
        save(figure, path)


def straight(start: Mapping[str, Tensor], end: Mapping[str, Tensor], t: float) -> dict[str, Tensor]:
    """(1 - t) start + t end; integers are ``start``'s."""
    return {
        name: torch.lerp(a, end[name], t) if a.is_floating_point() else a
        for name, a in start.items()
    }


def points(count: int) -> list[float]:
    """``count`` values from 0 to 1."""
    return np.linspace(0, 1, count).tolist()
