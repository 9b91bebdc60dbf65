"""Evaluation in one pass: the ensemble, its merged counterparts and the baselines, side by side.

Deterministic: eval mode, the loaders' own order, nothing shuffled, augmented or autocast. Each
frozen expert sees each image once (``engine.features``); the CoopVecs of a batch are computed once
and handed to every mode. Accuracy is 100 * correct / samples per task, and the mean is the
unweighted mean over tasks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import length_hint
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from .. import _checks
from ..encoders.torch_func import default_chunk
from . import _evaluate_checks as checks
from . import batchnorm as bn
from ._evaluate_checks import Loader
from .batches import Peeked, unpack
from .merged import chunk_faults, per_sample_features, state_features
from .modes import BATCH_MODES, mean_coopvec, merge_vector, task_arithmetic
from .portland import ensemble_features
from .report import Report
from .tally import TaskTally

if TYPE_CHECKING:
    from .engine import NeuLig


class Batch(NamedTuple):
    """One batch: images (B, ...), features (B, N, D), coopvec (B, N)."""

    images: Tensor
    features: Tensor
    coopvec: Tensor


Predictor = Callable[[Batch], Tensor]  # -> (B, D) features for the head


class _Plan(NamedTuple):
    """Everything an evaluation needs, checked."""

    loaders: dict[str, Peeked]
    modes: tuple[str, ...]
    vectors: dict[str, Tensor]
    own: dict[str, int] | None
    batchnorm: str
    chunk: int | None
    calibration: Mapping[str, Iterable[Any]]
    states: dict[str, dict[str, Tensor]]  # rows that are one given model: pretrained, ...


@torch.no_grad()
def evaluate(
    engine: NeuLig,
    loaders: Mapping[str, Loader],
    modes: Sequence[str] | None = None,
    *,
    pretrained: Mapping[str, Tensor] | None = None,
    own: Mapping[str, int | str] | None = None,
    split: str = "test",
    batchnorm: str = "blend",
    chunk: int | None = None,
    task_arithmetic_scale: float = 0.3,
    calibration: Mapping[str, Iterable[Any]] | None = None,
    progress: bool = True,
) -> Report:
    """Accuracy of every expert, baseline and merge mode on every task.

    Args:
        engine: a trained engine.
        loaders: task -> batches of (images, labels), labels (B,) integers below the task's number
            of classes; the tasks are among the engine's heads. Read once, in their order, after
            everybody's first batch.
        modes: of :data:`~neulig_fast.neulig.modes.MODES`; by default all that ``batchnorm``
            allows. The baselines ``uniform`` and ``hard`` are always there.
        pretrained: state dict of the experts' common ancestor, for the rows ``pretrained`` and
            ``task_arithmetic``.
        own: task -> its expert's index or name. By default the pool's names where they are the
            tasks, else the heads' order where there are as many heads as experts; otherwise the
            row ``expert`` and the share ``argmax_is_task`` are left out.
        split: what the loaders hold; only reported.
        batchnorm: a policy of :mod:`~neulig_fast.neulig.batchnorm` for the merged models; ``hard``
            and ``pretrained``, models as they are, keep their own statistics. (So does
            ``task_arithmetic`` under ``re_estimate``: the experts' mean.)
        chunk: merged models that ``per_sample`` holds at a time, if any; see
            :func:`~neulig_fast.neulig.modes.merged_forward`.
        task_arithmetic_scale: coefficient of the summed task vectors.
        calibration: task -> loader whose mean CoopVec is the task's merge vector, instead of the
            vectors that ``fit`` stored; ``batchnorm="re_estimate"`` measures on it. Must be
            re-iterable. The evaluated loaders themselves make ``dataset`` an oracle, and the
            report says so.
        progress: show a bar per task on stderr.

    Returns:
        A :class:`~neulig_fast.neulig.report.Report`.

    Raises:
        ValueError: everything that is wrong with the arguments and with the first batch of every
            loader, listed at once, before any image meets a model; then an encoder without rules
            that vmap cannot batch (``chunk=1`` runs it); later, labels out of range.
        TypeError: ``loaders``, ``own`` or ``calibration`` is no mapping from tasks.
    """
    started = time.perf_counter()
    checks.check_mappings(loaders=loaders, own=own, calibration=calibration)
    calibration = dict(calibration or {})
    calibrated = set(loaders) <= set(calibration)
    modes, faults = checks.all_modes(engine, modes, batchnorm, calibrated)
    experts, own_faults = checks.own_experts(engine, loaders, own)
    looks: dict[int, Peeked] = {}
    known, loader_faults = checks.peeked(engine, loaders, looks)
    faults += own_faults + loader_faults + chunk_faults(chunk)
    faults += checks.calibration_faults(engine, loaders, calibration)
    _checks.raise_all("evaluate", faults)
    calibration = {task: looks.get(id(loader), loader) for task, loader in calibration.items()}
    states = _ancestor_states(engine, pretrained, task_arithmetic_scale)
    if "per_sample" in modes:
        _try_per_sample(engine, known, batchnorm, chunk)
    vectors = dict(engine.calibration)
    vectors |= {task: mean_coopvec(engine, loader) for task, loader in calibration.items()}
    plan = _Plan(known, modes, vectors, experts, batchnorm, chunk, calibration, states)
    tallies = {task: _evaluate_task(engine, task, plan, progress) for task in known}
    settings = _settings(engine, plan, split, task_arithmetic_scale)
    seconds = time.perf_counter() - started
    return Report.from_tallies(tallies, settings, seconds, engine.history)


def _try_per_sample(
    engine: NeuLig, loaders: Mapping[str, Peeked], batchnorm: str, chunk: int | None
) -> None:
    """Two images side by side: what vmap cannot run is said before the long work, not amid it."""
    images = bn.images_of(next(iter(loaders.values())).peek())[:2]
    chunk = min(len(images), chunk or default_chunk(engine.pool))
    if chunk > 1:
        weights = torch.full((len(images), engine.pool.num_experts), 1 / engine.pool.num_experts)
        per_sample_features(engine.pool, images, weights, batchnorm, chunk)


def _ancestor_states(
    engine: NeuLig, pretrained: Mapping[str, Tensor] | None, scale: float
) -> dict[str, dict[str, Tensor]]:
    """The rows that need the experts' common ancestor."""
    if pretrained is None:
        return {}
    merged = task_arithmetic(engine.pool, pretrained, scale)
    given = {
        name: pretrained[name].to(tensor.device, tensor.dtype) if name in pretrained else tensor
        for name, tensor in merged.items()
    }
    return {"pretrained": given, "task_arithmetic": merged}


def _evaluate_task(engine: NeuLig, task: str, plan: _Plan, progress: bool) -> TaskTally:
    head = engine.heads[task]
    predictors = dict(_predictors(engine, task, plan))
    expert = None if plan.own is None else plan.own[task]
    tally = TaskTally(engine.pool.num_experts, expert)
    batches = track(
        plan.loaders[task],
        description=f"evaluate {task}",
        total=length_hint(plan.loaders[task]) or None,
        console=Console(stderr=True),
        disable=not progress,
    )
    for number, pair in enumerate(batches):
        images, labels = unpack(pair, head.num_classes, f"task {task!r}: batch {number}")
        features = engine.features(images)
        batch = Batch(images, features, engine.portland.coopvec(features))
        with torch.autocast(features.device.type, enabled=False):  # logits of bf16 have ties
            predictions = {row: head(f(batch)).argmax(1).cpu() for row, f in predictors.items()}
        tally.add(predictions, labels, batch.coopvec.cpu())
    return tally


def _predictors(engine: NeuLig, task: str, plan: _Plan) -> Iterator[tuple[str, Predictor]]:
    """Row of the report -> what computes its features."""
    yield "ensemble", lambda batch: ensemble_features(batch.coopvec, batch.features)
    if plan.own is not None:
        yield "expert", _expert(plan.own[task])
    for row, state in plan.states.items():
        own = "blend" if row == "pretrained" else plan.batchnorm
        yield row, _fixed(engine, state, own)
    calibration = plan.calibration.get(task)
    for mode in plan.modes:
        if mode in BATCH_MODES:
            yield mode, _batched(engine, mode, plan, calibration)
            continue
        vector = merge_vector(engine, mode, task=task, vectors=plan.vectors)
        if mode == "hard":
            yield mode, _expert(int(vector.argmax()))
        else:
            state = bn.merged_state_dict(engine.pool, vector, plan.batchnorm, calibration)
            yield mode, _fixed(engine, state, plan.batchnorm)


def _expert(index: int) -> Predictor:
    return lambda batch: batch.features[:, index]


def _fixed(engine: NeuLig, state: Mapping[str, Tensor], batchnorm: str) -> Predictor:
    return lambda batch: state_features(engine.pool, state, batch.images, batchnorm)


def _batched(
    engine: NeuLig, mode: str, plan: _Plan, calibration: Iterable[Any] | None
) -> Predictor:
    pool, batchnorm = engine.pool, plan.batchnorm

    def predict(batch: Batch) -> Tensor:
        if mode == "per_sample":
            return per_sample_features(pool, batch.images, batch.coopvec, batchnorm, plan.chunk)
        vector = batch.coopvec[0] if mode == "first_sample" else batch.coopvec.mean(0)
        state = bn.merged_state_dict(pool, vector, batchnorm, calibration)
        return state_features(pool, state, batch.images, batchnorm)

    return predict


def _settings(
    engine: NeuLig, plan: _Plan, split: str, task_arithmetic_scale: float
) -> dict[str, Any]:
    names = list(engine.pool.names)
    own = None if plan.own is None else {task: names[i] for task, i in plan.own.items()}
    return {
        "modes": list(plan.modes),
        "split": split,
        "batchnorm": plan.batchnorm,
        "buffers": "float buffers blended, integer buffers from expert 0",
        "transform": "the loaders' own; evaluation adds no shuffling and no augmentation",
        "calibration": _calibration_note(plan),
        "task_arithmetic_scale": task_arithmetic_scale,
        "experts": names,
        "own": own,
        "parameters_per_expert": engine.pool.num_params,
        "dtype": str(engine.pool.params.dtype).removeprefix("torch."),
        "alignment": engine.alignment,
        "boosting": engine.boosting,
        "scaling": engine.scaling,
        "seed": engine.seed,
    }


def _calibration_note(plan: _Plan) -> str:
    oracle = [t for t, loader in plan.loaders.items() if plan.calibration.get(t) is loader]
    if oracle:
        return f"oracle: the evaluated images themselves ({', '.join(oracle)})"
    return "loaders given to evaluate" if plan.calibration else "stored by fit"
