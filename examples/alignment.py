"""Merge networks that were trained from different initialisations: what alignment is worth.

    python examples/alignment.py          # trains everything first, in minutes
    python examples/alignment.py --toy    # tiny networks, in seconds

Small vision transformers and ResNets learn different tasks from random weights of their own, in
front of the same text embeddings. Then each group is merged as it is, aligned by weights (Git
Re-Basin, arXiv 2209.04836), by activations (ZipIt, arXiv 2305.03053) and by both (MuDSC, arXiv
2403.01753), and with NeuLig. docs/align.md reads the results.
"""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from neulig_fast.demo import aligned, aligned_figures
from neulig_fast.demo.origins import GROUPS, Group, OriginSettings, Output, make_output, train
from neulig_fast.demo.pipeline import Stages

TOY = ("ViT, two tasks",)
Results = dict[str, dict[str, Any]]


def run(
    folder: Path, settings: OriginSettings, groups: Mapping[str, Group], console: Console
) -> Results:
    """Train, align, merge and measure; write ``alignment.json`` and figures into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    stages = Stages(console)
    output = make_output(settings, stages)
    experts = train(groups.values(), output, settings, stages)
    results: Results = {}
    for title, group in groups.items():
        own = [experts[group.architecture, member] for member in group.members]
        with stages.stage(f"merging: {title}"):
            results[title] = _measure(title, group, own, output, settings, folder)
        console.print(table(title, results[title]))
    curves = {title: found["curves"] for title, found in results.items() if found["curves"]}
    if curves:
        aligned_figures.barriers(curves, folder / "alignment-barriers.png")
    report = {
        "settings": dataclasses.asdict(settings),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seconds": {**stages.seconds, "all": sum(stages.seconds.values())},
        "groups": results,
    }
    (folder / "alignment.json").write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"{report['seconds']['all']:.0f} s in all. Everything is in {folder}/")
    return results


def _measure(
    title: str,
    group: Group,
    experts: list[aligned.State],
    output: Output,
    settings: OriginSettings,
    folder: Path,
) -> dict[str, Any]:
    trial = aligned.make_trial(group, experts, output, settings)
    found = aligned.make_alignments(trial, settings)
    rows = {name: score._asdict() for name, score in aligned.merged_rows(trial, found)}
    tops: dict[str, float] = {}
    for name, score, top in aligned.neulig_rows(trial, found.dual, settings):
        rows[name], tops[name] = score._asdict(), top
    pair = len(experts) == 2
    if pair:
        _heat_map(title, found, folder)
    return {
        "experts": trial.names,
        "rows": rows,
        "largest_weight": tops,
        "balance": {"align": found.dual.balance, "zip": found.dual_zip.balance},
        "calibration": {
            kind: {str(balance): score for balance, score in scores.items()}
            for kind, scores in found.scores.items()
        },
        "trace": {"before": found.dual.trace_before, "after": found.dual.trace_after},
        "similarity": {
            "weights": found.weights.value,
            "activations": found.activations.value,
            "both": found.dual.value,
        },
        "curves": _curves(trial, found, settings) if pair else None,
    }


def _curves(
    trial: aligned.Trial, found: aligned.Alignments, settings: OriginSettings
) -> dict[str, Any]:
    ends = {
        "unaligned": trial.experts[1],
        "weights": found.weights.apply(1),
        "activations": found.activations.apply(1),
        "both (MuDSC)": found.dual.apply(1),
    }
    t = aligned_figures.points(settings.points)
    loss = {
        name: [trial.loss(aligned_figures.straight(trial.experts[0], end, at)) for at in t]
        for name, end in ends.items()
    }
    return {"names": trial.names, "t": t, "loss": loss}


def _heat_map(title: str, found: aligned.Alignments, folder: Path) -> None:
    """Of the node whose activations are matched best."""
    values = found.activations.values[-1]
    node = max(values, key=values.__getitem__)
    before = found.similarity[node][0, 1]
    path = folder / f"alignment-{'-'.join(title.lower().replace(',', '').split())}.png"
    order = found.activations.order(1)[node]
    aligned_figures.similarities(before, order, f"{title}: node {node}", path)


def table(title: str, found: Mapping[str, Any]) -> Table:
    """Accuracies of one group."""
    shown = Table(
        "", "own task", "all classes", "largest weight",
        title=f"{title}: {', '.join(found['experts'])}. Accuracy on test images, %",
        title_justify="left", box=box.SIMPLE_HEAD,
    )  # fmt: skip
    for name, score in found["rows"].items():
        top = found["largest_weight"].get(name)
        cells = (
            f"{score['own']:.1f}",
            f"{score['joint']:.1f}",
            "" if top is None else f"{top:.2f}",
        )
        shown.add_row(name, *cells)
    return shown


def main(
    out: Annotated[Path, typer.Option(help="Folder for the report and figures.")] = Path(
        "runs/alignment"
    ),
    seed: Annotated[int, typer.Option(help="Of data and training.", min=0)] = 0,
    toy: Annotated[bool, typer.Option("--toy", help="In seconds; learns nothing.")] = False,
) -> None:
    """Train networks of different origin and merge them with and without alignment."""
    settings = OriginSettings.toy() if toy else OriginSettings()
    demo = dataclasses.replace(settings.demo, seed=seed)
    groups = {title: GROUPS[title] for title in TOY} if toy else GROUPS
    run(out, dataclasses.replace(settings, demo=demo), groups, Console())


if __name__ == "__main__":
    typer.run(main)
