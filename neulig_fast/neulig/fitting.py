"""From loaders to a fitted Portland: checks, features, validation split, training, calibration."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from .._checks import raise_all
from ..state_files import make_writable_folder
from ._fit_checks import FitOptions, Loaders, Source, setting_faults, sources, zero_faults
from .batches import Peeked
from .checkpoint import Checkpoint
from .features import Collected
from .history import Callback, EpochReport, History
from .penalty import Penalty
from .portland import Portland
from .train import FitSettings, TaskData, Trainer, derived_generator

if TYPE_CHECKING:
    from .engine import NeuLig


class Fitted(NamedTuple):
    """What a fit leaves in the engine."""

    portland: Portland
    history: History
    calibration: dict[str, Tensor]


def fit(
    engine: NeuLig, loaders: Loaders, options: FitOptions, progress: bool, callback: Callback | None
) -> Fitted:
    """Collect the features, train on them, and average each task's CoopVecs."""
    raise_all("fit", setting_faults(engine, loaders, options))
    if options.checkpoint is not None:
        path = Path(options.checkpoint)
        make_writable_folder(path if path.is_dir() else path.parent)
    with _bars(progress) as bars:
        training, validation = _rows(engine, loaders, options, bars)
        settings = FitSettings(
            options.epochs,
            float(options.lr),
            options.batch_size,
            engine.boosting,
            engine.scaling,
            options.patience,
            options.starts,
            engine.seed,
            options.checkpoint_every,
        )
        checkpoint = None
        if options.checkpoint is not None:
            facts = _facts(engine, options, training, validation)
            checkpoint = Checkpoint(options.checkpoint, facts)
        penalty = Penalty(engine.alignment_matrix, engine.centered, engine.scaling)
        trainer = Trainer(training, penalty, settings, validation, checkpoint)
        portland, history = trainer.run(_reporting(bars, options, callback))
    return Fitted(portland, history, _calibrate(portland, training))


# -- features ----------------------------------------------------------------------------------


def _rows(
    engine: NeuLig, loaders: Loaders, options: FitOptions, bars: Progress
) -> tuple[list[TaskData], list[TaskData]]:
    """Training and validation rows of every task; all first batches are looked at before."""
    fraction = options.fraction
    labelled = engine.boosting == "supervised" or fraction is not None
    looks: dict[int, Peeked] = {}
    plan = [(sources(engine, loaders, labelled, "task", looks), options.views)]
    if isinstance(options.validation, Mapping):
        plan.append((sources(engine, options.validation, True, "validation of task", looks), 1))
    every = [source for part, _ in plan for source in part.values()]
    faults = [source.loader.fault(source.num_classes, source.name) for source in every]
    raise_all("fit", filter(None, faults))
    training, *rest = [
        [_collect(engine, task, source, views, bars) for task, source in part.items()]
        for part, views in plan
    ]
    if fraction is not None:
        halves = [_split(rows, fraction, engine.seed) for rows in training]
        return [kept.data for kept, _ in halves], [aside.data for _, aside in halves]
    return [rows.data for rows in training], [rows.data for part in rest for rows in part]


class _Rows(NamedTuple):
    """A task's rows sorted by content, and the content of each, (V·M, 16) uint8."""

    data: TaskData
    keys: Tensor


def _collect(engine: NeuLig, task: str, source: Source, views: int, bars: Progress) -> _Rows:
    head = engine.heads[task]
    bar = bars.add_task(f"features {task}", total=length_hint(source.loader) * views or None)
    collected = engine.cache.collect(
        source.loader,
        name=source.name,
        num_classes=source.num_classes,
        views=views,
        advance=lambda: bars.advance(bar),
    )
    bars.remove_task(bar)
    if head.normalize:
        raise_all(f"fit: {source.name}", zero_faults(collected.features, engine.pool.names))
    data = TaskData(task, collected.features, collected.labels, head, views)
    return _subset(_Rows(data, collected.keys), _canonical_order(collected))


def _canonical_order(rows: Collected) -> Tensor:
    """Row numbers sorted by content within every view, so that the loader's order is forgotten."""
    columns = list(rows.keys.numpy().T[::-1])
    if rows.labels is not None:
        columns.insert(0, rows.labels.cpu().numpy())
    view = np.arange(len(rows.keys)) // (len(rows.keys) // rows.views)
    return torch.from_numpy(np.lexsort((*columns, view)))


def _split(rows: _Rows, fraction: float, seed: int) -> tuple[_Rows, _Rows]:
    """Set aside a fraction of the different images, each with all its copies."""
    name = rows.data.name
    different, image = torch.unique(rows.keys, dim=0, return_inverse=True)
    size = len(different)
    aside = max(1, round(fraction * size))
    if aside >= size:
        raise ValueError(
            f"fit: task {name!r} has {size} different images, too few to set {fraction:g} of them "
            "aside"
        )
    drawn = torch.zeros(size, dtype=torch.bool)
    drawn[torch.randperm(size, generator=derived_generator(seed, "validation", name))[:aside]] = 1
    aside_too = drawn[image]
    return _subset(rows, (~aside_too).nonzero()[:, 0]), _subset(rows, aside_too.nonzero()[:, 0])


def _subset(rows: _Rows, chosen: Tensor) -> _Rows:
    data, there = rows.data, chosen.to(rows.data.features.device)
    labels = None if data.labels is None else data.labels[there]
    data = data._replace(features=data.features[there], labels=labels)
    return _Rows(data, rows.keys[chosen])


def _facts(
    engine: NeuLig, options: FitOptions, training: list[TaskData], validation: list[TaskData]
) -> dict[str, Any]:
    """Everything that determines the bits of a fit, for its checkpoint."""
    facts = {
        key: value
        for key, value in options._asdict().items()
        if key not in ("lr", "validation", "checkpoint", "checkpoint_every")
    }
    facts["lr"] = float(options.lr)
    for key in ("alignment", "boosting", "scaling", "seed"):
        facts[key] = getattr(engine, key)
    facts["order of tasks"] = list(engine.heads)
    facts["experts"] = engine.pool.fingerprint
    facts["alignment matrix"] = _hash(engine.alignment_matrix)
    for kind, rows in (("training", training), ("validation", validation)):
        for data in rows:
            facts[f"{kind} data of {data.name}"] = _hash(data.features, data.labels)
    for task, head in engine.heads.items():
        facts[f"head of {task}"] = _hash(head.weight, head.bias)
        facts[f"normalize of {task}"] = head.normalize
    return facts


def _hash(*tensors: Tensor | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        if tensor is not None:
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(flat.numpy())
    return digest.hexdigest()


@torch.no_grad()
def _calibrate(portland: Portland, training: list[TaskData]) -> dict[str, Tensor]:
    return {data.name: portland.coopvec(data.features).double().mean(0).cpu() for data in training}


# -- progress ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _bars(progress: bool) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not progress
    ) as bars:
        yield bars


def _reporting(bars: Progress, options: FitOptions, callback: Callback | None) -> Callback | None:
    """The user's callback and the bar in one; None when neither wants to know."""
    if bars.disable:
        return callback
    bar = bars.add_task("portland", total=options.epochs * options.starts)

    def report(epoch: EpochReport) -> None:
        accuracy = "" if epoch.accuracy is None else f", validation {epoch.accuracy:.1f} %"
        text = f"portland: boosting {epoch.boosting:.3f}{accuracy}"
        done = epoch.start * options.epochs + epoch.epoch
        bars.update(bar, completed=done, description=text)
        if callback is not None:
            callback(epoch)

    return report
