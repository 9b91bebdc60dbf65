"""The plain words at the end of a report, every one of them derived from its numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import Report

# Sharpness is the mean largest weight, scaled so that uniform CoopVecs have 0 and one-hot ones 1.
SHARPNESS = (
    (0.95, "routed"),
    (0.6, "mostly routed"),
    (0.1, "mixed the experts"),
    (-math.inf, "stayed close to uniform"),
)
_MERGED = {"per_sample": "per sample", "dataset": "per data set"}


def verdict(report: Report) -> str:
    """Two to four sentences: what the CoopVecs did, and merging against ensemble and routing."""
    sentences = [
        _coopvec_sentence(report),
        _ensemble_sentence(report),
        _routing_sentence(report),
        _global_sentence(report),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _experts(report: Report) -> int:
    return len(report.coopvec["tasks"][report.tasks[0]]["mean"])


def kind(report: Report) -> str:
    """What the CoopVecs did, in a word or two (:data:`SHARPNESS`)."""
    count = _experts(report)
    if count == 1:
        return "had one expert to choose from"
    sharpness = (report.coopvec["max"] - 1 / count) / (1 - 1 / count)
    return next(words for least, words in SHARPNESS if sharpness >= least)


def _routes(report: Report) -> bool:
    return kind(report) in ("routed", "mostly routed")


def _astray(report: Report) -> bool:
    """Whether the largest weights are on the images' own experts not even half as much above
    chance as they could be."""
    share, chance = report.coopvec["argmax_is_task"], 1 / _experts(report)
    return share is not None and share < (1 + chance) / 2 and chance < 1


def _coopvec_sentence(report: Report) -> str:
    count, vectors = _experts(report), report.coopvec
    other = _routes(report) and _astray(report)
    aside = ", often to another expert than the image's own" if other else ""
    text = (
        f"The CoopVecs {kind(report)}{aside}: their largest weight is {vectors['max']:.2f} on "
        f"average (one-hot 1, uniform {1 / count:.2f}), their entropy "
        f"{abs(vectors['entropy']):.2f} of at most {math.log(count):.2f} nats"
    )
    share = vectors["argmax_is_task"]
    if share is None:
        return text + "."
    return (
        text + f"; the largest weight is on the image's own expert for {100 * share:.1f} % of the "
        "images."
    )


def _ensemble_sentence(report: Report) -> str:
    ensemble = report.accuracy["ensemble"]["mean"]
    parts = []
    for row, name in _MERGED.items():
        if row in report.accuracy:
            parts.append(
                f"{name} {report.accuracy[row]['mean']:.1f} % "
                f"({_offset(-report.gap[row]['mean'])}, the same answer for "
                f"{report.agreement[row]['mean']:.1f} % of the images)"
            )
    if not parts:
        return ""
    return f"Against the ensemble's {ensemble:.1f} %, merging reaches {' and '.join(parts)}."


def _routing_sentence(report: Report) -> str:
    present = [row for row in _MERGED if row in report.accuracy]
    if not present or "hard" not in report.accuracy:
        return ""
    hard, noise = report.accuracy["hard"]["mean"], standard_error(report, "hard")
    above = {row: report.accuracy[row]["mean"] - hard for row in present}
    found = [
        f"merging {_MERGED[row]} is {_offset(points)} {'it' if round(points, 1) else 'with it'}, "
        f"{'within' if abs(points) <= noise else 'beyond'} that error"
        for row, points in above.items()
    ]
    costly = [_MERGED[row] for row, points in above.items() if points < -noise]
    text = (
        f"Hard routing, one expert as it is per data set, reaches {hard:.1f} % (standard error "
        f"{noise:.1f} points); {', and '.join(found)}"
    )
    if costly:
        return f"{text}: here mixing {' and '.join(costly)} costs."
    alike = max(above.values()) <= noise and _routes(report) and not _astray(report)
    return text + (": here merging is in effect routing." if alike else ".")


def _global_sentence(report: Report) -> str:
    if not {"global", "uniform"} <= set(report.accuracy):
        return ""
    one, plain = report.accuracy["global"]["mean"], report.accuracy["uniform"]["mean"]
    relation = "like" if abs(one - plain) <= standard_error(report, "uniform") else "against"
    return (
        f"One merged model for all tasks at once reaches {one:.1f} %, {relation} plain averaging's "
        f"{plain:.1f} %."
    )


def _offset(points: float) -> str:
    if round(points, 1) == 0:
        return "level"
    return f"{abs(points):.1f} points {'above' if points > 0 else 'below'}"


def standard_error(report: Report, row: str) -> float:
    """Binomial standard error of a row's mean accuracy, in points."""
    samples = report.settings["samples"]
    variances = []
    for task in report.tasks:
        share = report.accuracy[row][task] / 100
        variances.append(share * (1 - share) / samples[task])
    return 100 * math.sqrt(math.fsum(variances)) / len(report.tasks)
