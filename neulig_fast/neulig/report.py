"""What an evaluation found: a table, a JSON file, figures and a plain verdict."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..state_files import write_json
from .tally import TaskTally

if TYPE_CHECKING:
    from .history import History

_MOST_POINTS = 1000
_GAP = "ensemble minus row, in points: above zero the row is behind"


class Row(NamedTuple):
    """How a row of a report is called and where it belongs."""

    name: str  # in tables and figures
    group: str  # reference | baseline | ensemble | merged


# In display order. A merge mode that is no baseline is compared with the ensemble.
ROWS = {
    "pretrained": Row("pre-trained", "reference"),
    "expert": Row("own expert", "reference"),
    "uniform": Row("uniform average", "baseline"),
    "task_arithmetic": Row("task arithmetic", "baseline"),
    "global": Row("merged, one for all", "baseline"),
    "hard": Row("hard routing", "baseline"),
    "ensemble": Row("ensemble", "ensemble"),
    "per_sample": Row("merged per sample", "merged"),
    "dataset": Row("merged per data set", "merged"),
    "batch_mean": Row("merged, batch mean", "merged"),
    "first_sample": Row("merged, batch first", "merged"),
}


@dataclasses.dataclass
class Report:
    """Results of :func:`~neulig_fast.neulig.evaluate.evaluate`. Percent, unless said otherwise.

    Attributes:
        tasks: names, in evaluation order.
        accuracy: row -> {task: percent, ..., "mean": unweighted mean over tasks}.
        agreement: row -> the same keys: percent of images that get the ensemble's answer.
        coopvec: ``max`` (mean largest weight), ``entropy`` (mean, nats), ``argmax_is_task``
            (share of images, 0 to 1, whose largest weight is their own expert's; None when nobody
            knows the own experts), all unweighted means over tasks; ``tasks``: task -> the same
            three and ``mean``, the task's mean CoopVec (N,).
        settings: modes, split, batch size, samples, BatchNorm policy, ...
        seconds: wall time.
        history: the loss terms of the fit as at most 1000 points, each a mean over
            ``rounds_per_point`` rounds of one step per task: ``boosting`` and ``alignment`` are
            lists of points, a point holds one value per task of ``tasks``. None without a fit.
    """

    tasks: list[str]
    accuracy: dict[str, dict[str, float]]
    agreement: dict[str, dict[str, float]]
    coopvec: dict[str, Any]
    settings: dict[str, Any]
    seconds: float
    history: dict[str, Any] | None = None

    @classmethod
    def from_tallies(
        cls,
        tallies: Mapping[str, TaskTally],
        settings: Mapping[str, Any],
        seconds: float,
        history: History | None = None,
    ) -> Report:
        """A report from the counts of every task."""
        per_task = {task: tally.coopvec() for task, tally in tallies.items()}
        coopvec: dict[str, Any] = {
            key: _mean([stats[key] for stats in per_task.values()])
            for key in ("max", "entropy", "argmax_is_task")
        }
        counted = {
            "samples": {task: tally.samples for task, tally in tallies.items()},
            "batch_size": {task: tally.batch_size for task, tally in tallies.items()},
        }
        return cls(
            tasks=list(tallies),
            accuracy=_by_row({task: tally.accuracy() for task, tally in tallies.items()}),
            agreement=_by_row({task: tally.agreement() for task, tally in tallies.items()}),
            coopvec={**coopvec, "tasks": per_task},
            settings={**settings, **counted},
            seconds=seconds,
            history=_curves(history),
        )

    @property
    def gap(self) -> dict[str, dict[str, float]]:
        """Row -> {task or "mean": accuracy of the ensemble minus the row's}, in points."""
        ensemble = self.accuracy["ensemble"]
        return {
            row: {column: ensemble[column] - value for column, value in values.items()}
            for row, values in self.accuracy.items()
            if row != "ensemble"
        }

    def to_json(self, path: str | Path) -> None:
        """Write everything to ``path``, atomically: an old file stays intact until the end.

        Beside the attributes: ``gap``, and ``gap_is``, which says how its sign is meant.
        """
        gap = {"gap": self.gap, "gap_is": _GAP}
        write_json(Path(path), {**dataclasses.asdict(self), **gap})

    @classmethod
    def from_json(cls, path: str | Path) -> Report:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: a file that is not JSON or not a report.
        """
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        wanted = [field.name for field in dataclasses.fields(cls)]
        missing = set(wanted) - set(content) if isinstance(content, dict) else set(wanted)
        if missing:
            raise ValueError(f"{path} is not a report: it lacks {', '.join(sorted(missing))}")
        return cls(**{name: content[name] for name in wanted})

    def rows(self, *groups: str) -> list[str]:
        """The rows of this report, of these groups or of all, in display order."""
        return [
            row
            for row, about in ROWS.items()
            if row in self.accuracy and (not groups or about.group in groups)
        ]

    def table(self) -> Table:
        """Accuracy per row and task, the gap to the ensemble and the agreement with it."""
        table = _table(f"Accuracy on the {self.settings['split']} split, %")
        for column in (*self.tasks, "mean", "vs ens.", "same"):
            table.add_column(column, justify="right")
        table.caption = "vs ens.: points above the ensemble; same: % of images with its answer"
        group = None
        for row in self.rows():
            about = ROWS[row]
            if group not in (None, about.group):
                table.add_section()
            group = about.group
            cells = [f"{self.accuracy[row][column]:.1f}" for column in (*self.tasks, "mean")]
            cells += self._against_ensemble(row)
            table.add_row(about.name, *cells, style="bold" if group == "ensemble" else None)
        return table

    def _against_ensemble(self, row: str) -> list[str]:
        if ROWS[row].group in ("ensemble", "reference"):
            return ["", ""]
        return [_signed(-self.gap[row]["mean"]), f"{self.agreement[row]['mean']:.1f}"]

    def __rich__(self) -> Group:
        return Group(self.table(), Text("\n" + self.verdict()))

    def verdict(self) -> str:
        """Whether the CoopVecs routed or mixed, and how merging compares; derived from numbers."""
        from .verdict import verdict

        return verdict(self)

    def plot(self, folder: str | Path) -> list[Path]:
        """Draw accuracy, CoopVecs and, where there is a history, losses into PNG files.

        Returns:
            The files written: ``accuracy.png``, ``coopvecs.png``, ``losses.png``.
        """
        from .figures import plot  # matplotlib takes a second to import

        return plot(self, Path(folder))


def compare(reports: Mapping[str, Report]) -> Table:
    """Several settings side by side: mean accuracy and gap to each one's own ensemble."""
    table = _table("Mean accuracy, % (points above its own ensemble)")
    for label in reports:
        table.add_column(label, justify="right")
    present = [row for row in ROWS if any(row in report.accuracy for report in reports.values())]
    group = None
    for row in present:
        if group not in (None, ROWS[row].group):
            table.add_section()
        group = ROWS[row].group
        cells = [_compared(report, row) for report in reports.values()]
        table.add_row(ROWS[row].name, *cells, style="bold" if group == "ensemble" else None)
    table.add_section()
    for name, key, form in (
        ("CoopVec: mean largest weight", "max", "{:.2f}"),
        ("CoopVec: mean entropy, nats", "entropy", "{:.2f}"),
        ("CoopVec: argmax is own expert, share", "argmax_is_task", "{:.3f}"),
    ):
        values = [report.coopvec[key] for report in reports.values()]
        table.add_row(name, *("-" if v is None else form.format(v) for v in values))
    return table


def _compared(report: Report, row: str) -> str:
    if row not in report.accuracy:
        return "-"
    cell = f"{report.accuracy[row]['mean']:.1f}"
    if ROWS[row].group in ("merged", "baseline"):
        cell += f" ({_signed(-report.gap[row]['mean'])})"
    return cell


def _table(title: str) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", caption_justify="left",
        box=box.SIMPLE_HEAD, padding=0, pad_edge=False,
    )  # fmt: skip
    table.add_column("", no_wrap=True)
    return table


def _signed(points: float) -> str:
    """One decimal with its sign, a true minus and no sign on zero."""
    return f"{points:+.1f}".replace("-0.0", "0.0").replace("+0.0", "0.0").replace("-", "−")


def _curves(history: History | None) -> dict[str, Any] | None:
    """A training history as JSON, thinned; what is not finite becomes None."""
    if history is None or not len(history.boosting):
        return None
    width = -(-len(history.boosting) // _MOST_POINTS)

    def thin(values: Tensor) -> list[list[float | None]]:
        points = [part.double().mean(0).tolist() for part in values.cpu().split(width)]
        return [[x if math.isfinite(x) else None for x in point] for point in points]

    return {
        "tasks": list(history.tasks),
        "rounds_per_point": width,
        "rounds_per_epoch": history.rounds_per_epoch,
        "epoch": history.epoch,
        "boosting": thin(history.boosting),
        "alignment": thin(history.alignment),
    }


def _by_row(per_task: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """{task: {row: x}} turned round, rows in display order, with their mean over tasks."""
    rows = [row for row in ROWS if all(row in values for values in per_task.values())]
    turned = {row: {task: values[row] for task, values in per_task.items()} for row in rows}
    return {row: {**values, "mean": _mean(list(values.values()))} for row, values in turned.items()}


def _mean(values: Sequence[Any]) -> Any:
    return None if None in values else math.fsum(values) / len(values)
