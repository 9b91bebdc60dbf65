"""From loaders to a fitted Portland: checks, features, validation split, training, calibration."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from .._checks import did_you_mean, raise_all
from .checkpoint import Checkpoint
from .features import Collected
from .history import Callback, EpochReport, History
from .penalty import Penalty
from .portland import Portland
from .train import FitSettings, TaskData, Trainer, derived_generator

if TYPE_CHECKING:
    from .engine import NeuLig

Loaders = Mapping[str, Iterable[Any]]


class FitOptions(NamedTuple):
    """The arguments of :meth:`NeuLig.fit`."""

    epochs: int
    lr: float
    batch_size: int
    validation: Loaders | float | None
    patience: int | None
    starts: int
    views: int
    checkpoint: str | Path | None
    checkpoint_every: int


class Fitted(NamedTuple):
    """What a fit leaves in the engine."""

    portland: Portland
    history: History
    calibration: dict[str, Tensor]


def fit(
    engine: NeuLig, loaders: Loaders, options: FitOptions, progress: bool, callback: Callback | None
) -> Fitted:
    """Collect the features, train on them, and average each task's CoopVecs."""
    raise_all("fit", _faults(engine, loaders, options))
    with _bars(progress) as bars:
        training, validation = _rows(engine, loaders, options, bars)
        settings = FitSettings(
            options.epochs,
            options.lr,
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


def _faults(engine: NeuLig, loaders: Any, options: FitOptions) -> Iterator[str]:
    yield from _task_faults("loaders", loaders, engine)
    for name in ("epochs", "batch_size", "starts", "views", "checkpoint_every"):
        value = getattr(options, name)
        if not isinstance(value, int) or value < 1:
            yield f"{name} must be an int >= 1, got {value!r}"
    if not options.lr > 0:
        yield f"lr must be positive, got {options.lr}"
    validation = options.validation
    if isinstance(validation, float):
        if not 0 < validation < 1:
            yield f"validation must be between 0 and 1 as a fraction, got {validation}"
        if options.views > 1:
            yield (
                "a validation fraction would put views of one image on both sides; "
                "pass validation loaders with views > 1"
            )
    elif validation is not None:
        yield from _task_faults("validation", validation, engine)
    elif options.patience is not None or options.starts > 1:
        yield "patience and starts > 1 choose by validation accuracy: pass validation="
    if options.patience is not None and options.patience < 1:
        yield f"patience must be an int >= 1, got {options.patience!r}"


def _task_faults(name: str, loaders: Any, engine: NeuLig) -> Iterator[str]:
    if not isinstance(loaders, Mapping):
        yield f"{name} must map tasks to iterables of (images, labels), got {loaders!r}"
        return
    for task in loaders:
        if task not in engine.heads:
            yield f"{name}: no head for task {task!r}{did_you_mean(str(task), engine.heads)}"
    for task in engine.heads:
        if task not in loaders:
            yield f"{name}: no loader for task {task!r}"


# -- features ----------------------------------------------------------------------------------


def _rows(
    engine: NeuLig, loaders: Loaders, options: FitOptions, bars: Progress
) -> tuple[list[TaskData], list[TaskData]]:
    fraction = options.validation if isinstance(options.validation, float) else None
    labelled = engine.boosting == "supervised" or fraction is not None
    training, validation = [], []
    for task in engine.heads:
        data = _collect(engine, task, loaders[task], options.views, labelled, bars)
        if fraction is not None:
            data, aside = _split(data, fraction, engine.seed)
            validation.append(aside)
        training.append(data)
    if isinstance(options.validation, Mapping):
        for task in engine.heads:
            validation.append(_collect(engine, task, options.validation[task], 1, True, bars))
    return training, validation


def _collect(
    engine: NeuLig, task: str, loader: Iterable[Any], views: int, labelled: bool, bars: Progress
) -> TaskData:
    head = engine.heads[task]
    total = len(loader) * views if isinstance(loader, Sized) else None
    bar = bars.add_task(f"features {task}", total=total)
    collected = engine.cache.collect(
        loader,
        name=f"task {task!r}",
        num_classes=head.num_classes if labelled else None,
        views=views,
        advance=lambda: bars.advance(bar),
    )
    bars.remove_task(bar)
    order = _canonical_order(collected).to(collected.features.device)
    labels = None if collected.labels is None else collected.labels[order]
    return TaskData(task, collected.features[order], labels, head, views)


def _canonical_order(rows: Collected) -> Tensor:
    """Row numbers sorted by content within every view, so that the loader's order is forgotten."""
    columns = list(rows.keys.numpy().T[::-1])
    if rows.labels is not None:
        columns.insert(0, rows.labels.cpu().numpy())
    view = np.arange(len(rows.keys)) // (len(rows.keys) // rows.views)
    return torch.from_numpy(np.lexsort((*columns, view)))


def _split(data: TaskData, fraction: float, seed: int) -> tuple[TaskData, TaskData]:
    size = len(data.features)
    aside = max(1, round(fraction * size))
    if aside >= size:
        raise ValueError(
            f"fit: task {data.name!r} has {size} images, too few to set {fraction:g} of them aside"
        )
    generator = derived_generator(seed, "validation", data.name)
    order = torch.randperm(size, generator=generator).to(data.features.device)
    return _subset(data, order[aside:].sort().values), _subset(data, order[:aside].sort().values)


def _subset(data: TaskData, rows: Tensor) -> TaskData:
    labels = None if data.labels is None else data.labels[rows]
    return data._replace(features=data.features[rows], labels=labels)


def _facts(
    engine: NeuLig, options: FitOptions, training: list[TaskData], validation: list[TaskData]
) -> dict[str, Any]:
    """Everything that determines the bits of a fit, for its checkpoint."""
    facts = {
        key: value
        for key, value in options._asdict().items()
        if key not in ("validation", "checkpoint", "checkpoint_every")
    }
    for key in ("alignment", "boosting", "scaling", "seed"):
        facts[key] = getattr(engine, key)
    facts["experts"] = engine.pool.fingerprint
    facts["alignment matrix"] = _hash(engine.alignment_matrix)
    for kind, rows in (("training", training), ("validation", validation)):
        for data in rows:
            facts[f"{kind} data of {data.name}"] = _hash(data.features, data.labels)
            facts[f"head of {data.name}"] = _hash(data.head.weight, data.head.bias)
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
