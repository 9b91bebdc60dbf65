"""Which weights a merged model gets: the modes of merging (NeuLig, arXiv 2503.01268).

==================  =========================================  ==================================
mode                merge vector for sample b                  merged models
==================  =========================================  ==================================
``per_sample``      w_b, the sample's own CoopVec              one per image, exact
``batch_mean``      mean CoopVec of its batch                  one per batch: depends on the batch
``dataset``         mean CoopVec of a calibration set fixed    one per data set: the cost of a
                    beforehand                                 single model at inference
``global``          mean of the data sets' vectors             one for everything
``first_sample``    CoopVec of the batch's first sample        one per batch: the published code's
                                                               way, depends on order
``uniform``         1/N                                        one: plain averaging, a baseline
``hard``            one-hot argmax of the ``dataset`` vector   an expert as it is, a baseline
==================  =========================================  ==================================

NeuLig's merge depends on the data. ``global`` asks one vector to serve all data sets at once; the
data sets' vectors point to different experts, so their mean is close to uniform, and it performs
like plain averaging.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks
from . import batchnorm as bn
from .heads import Head
from .merged import chunk_faults, per_sample_features, state_features

if TYPE_CHECKING:
    from ..pool import ExpertPool
    from .engine import NeuLig

BATCH_MODES = ("per_sample", "batch_mean", "first_sample")
TASK_MODES = ("dataset", "hard")
FIXED_MODES = ("dataset", "global", "uniform", "hard")
MODES = ("per_sample", "batch_mean", "dataset", "global", "first_sample", "uniform", "hard")


def check_mode(mode: str, among: Iterable[str] = MODES) -> None:
    """ValueError naming the known modes when ``mode`` is none of ``among``."""
    if mode in among:
        return
    if mode in MODES:
        raise ValueError(
            f"mode {mode!r} makes a merged model per image or per batch, not one state dict; use "
            f"one of {', '.join(among)}, or merged_forward(images, head, mode={mode!r})"
        )
    hint = _checks.did_you_mean(mode, MODES)
    raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}{hint}")


def merged_forward(
    engine: NeuLig,
    images: Tensor,
    head: Head | str,
    mode: str = "per_sample",
    *,
    weights: Tensor | None = None,
    batchnorm: str = "blend",
    chunk: int | None = None,
    calibration: Iterable[Any] | None = None,
) -> Tensor:
    """Logits of the merged model or models for one batch.

    Args:
        images: (B, ...), whatever the encoder takes.
        head: the name of one of the engine's tasks, or a head. One that equals a task's head is
            that task's.
        mode: one of :data:`MODES`.
        weights: replaces the engine's CoopVecs. (B, N) for ``per_sample``, ``batch_mean`` and
            ``first_sample``; (N,), the data set's vector, for ``dataset``, ``global`` and ``hard``.
        batchnorm: one of :data:`~neulig_fast.neulig.batchnorm.POLICIES`; ``hard``, an expert as it
            is, has the expert's own statistics under every one.
        chunk: merged models held at a time in ``per_sample``, for encoders that no rule of
            :mod:`neulig_fast.encoders` covers; by default as many as fit 32 MiB of parameters on
            the CPU and 1 GiB elsewhere, and at least one. Where rules do, none is held.
        calibration: batches of images for ``batchnorm="re_estimate"``.

    Returns:
        (B, C) logits. Differentiable in ``weights`` when they are given, except through the argmax
        of ``hard`` and the measurements of ``re_estimate``.

    Raises:
        ValueError: an unknown mode or policy; a policy that the mode cannot have; weights of the
            wrong shape; a mode that needs a data set's vector where there is none, or a head of
            several tasks; an encoder without rules that vmap cannot batch (``chunk=1`` runs it).
        TypeError: ``images`` is no tensor, ``head`` neither a head nor a name.
    """
    _checks.check_tensors("merged_forward", images=images)
    check_mode(mode)
    known, tasks = resolve_head(engine, head)
    faults = chunk_faults(chunk) + bn.policy_faults(
        engine.pool,
        batchnorm,
        per_sample=mode == "per_sample",
        calibrated=calibration is not None or mode == "hard",
    )
    if mode in TASK_MODES and weights is None and len(tasks) > 1:
        faults.append(f"the head is that of {', '.join(tasks)}: name the task instead")
    if not len(images):
        faults.append("images must hold at least one image")
    _checks.raise_all("merged_forward", faults)
    if mode in BATCH_MODES:
        coopvec = _batch_coopvecs(engine, images, weights)
        if mode == "per_sample":
            return known(per_sample_features(engine.pool, images, coopvec, batchnorm, chunk))
        vector = coopvec[0] if mode == "first_sample" else coopvec.mean(0)
    else:
        vector = merge_vector(engine, mode, task=tasks[0] if tasks else None, weights=weights)
    batchnorm = "blend" if mode == "hard" else batchnorm
    state = bn.merged_state_dict(engine.pool, vector, batchnorm, calibration)
    return known(state_features(engine.pool, state, images, batchnorm))


def merge(
    engine: NeuLig,
    mode: str = "dataset",
    *,
    loader: Iterable[Any] | None = None,
    task: str | None = None,
    weights: Tensor | None = None,
    batchnorm: str = "blend",
) -> dict[str, Tensor]:
    """State dict of one merged model.

    Args:
        mode: ``dataset``, ``global``, ``uniform`` or ``hard``. ``global``, one vector for all
            tasks at once, performs like plain averaging.
        loader: the calibration set, batches of images or of (images, labels): the merge vector is
            its mean CoopVec, and ``batchnorm="re_estimate"`` measures on it. Read once for each
            of the two. For ``uniform`` and ``global`` it serves the re-estimation only.
        task: whose stored calibration vector to use when neither loader nor weights are given;
            may be left out when the engine has one task.
        weights: (N,), replaces the data set's vector.

    Returns:
        Name -> tensor, views of one new row; load it with ``encoder.load_state_dict``.

    Raises:
        ValueError: a mode that has no single model; no vector to merge with; an unknown task, or
            none where there are several; an empty loader.
    """
    check_mode(mode, FIXED_MODES)
    calibrated = loader is not None or mode == "hard"
    faults = bn.policy_faults(engine.pool, batchnorm, calibrated=calibrated)
    if task is not None and task not in engine.heads:
        faults.append(_unknown_task(engine, task))
    elif mode in TASK_MODES and loader is weights is task is None and len(engine.heads) > 1:
        faults.append(f"mode {mode!r}: name the task, one of {', '.join(engine.heads)}")
    _checks.raise_all("merge", faults)
    if loader is not None and isinstance(loader, Iterator) and batchnorm == "re_estimate":
        loader = list(loader)
    if loader is not None and weights is None and mode in TASK_MODES:
        weights = mean_coopvec(engine, loader)
    if task is None and len(engine.heads) == 1:
        task = next(iter(engine.heads))
    vector = merge_vector(engine, mode, task=task, weights=weights)
    batchnorm = "blend" if mode == "hard" else batchnorm
    return bn.merged_state_dict(engine.pool, vector, batchnorm, loader)


def merge_vector(
    engine: NeuLig,
    mode: str,
    *,
    task: str | None = None,
    weights: Tensor | None = None,
    vectors: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """(N,), the merge vector of a mode of :data:`FIXED_MODES`.

    ``vectors`` (task -> (N,)) stands in for ``engine.calibration``; ``weights`` for the result,
    before ``hard`` takes its argmax.
    """
    count = engine.pool.num_experts
    if mode == "uniform":
        if weights is not None:
            raise ValueError("mode 'uniform' is 1/N: it takes no weights")
        return torch.full((count,), 1 / count, dtype=torch.float64)
    vectors = engine.calibration if vectors is None else vectors
    if weights is not None:
        _check_weights(weights, (count,), mode)
        vector = weights
    elif mode == "global":
        if not vectors:
            raise ValueError(f"mode 'global' needs {_CALIBRATE}")
        vector = torch.stack([v.to(torch.float64) for v in vectors.values()]).mean(0)
    elif task is None or task not in vectors:
        whose = f"of task {task!r}" if task is not None else "and the head belongs to no task"
        raise ValueError(f"mode {mode!r} needs the data set's vector {whose}: {_CALIBRATE}")
    else:
        vector = vectors[task]
    if mode == "hard":
        vector = torch.nn.functional.one_hot(vector.argmax(), count).to(torch.float64)
    return vector


_CALIBRATE = (
    "fit() stores the tasks' calibration vectors; without it pass weights= (N,) or a loader"
)


@torch.no_grad()
def mean_coopvec(engine: NeuLig, loader: Iterable[Any]) -> Tensor:
    """(N,) float64: the mean CoopVec over a calibration set, each image counting once.

    Does not depend on batch size or order beyond float64 rounding.
    """
    total = torch.zeros(engine.pool.num_experts, dtype=torch.float64)
    seen = 0
    for batch in loader:
        coopvec = engine.portland.coopvec(engine.features(bn.images_of(batch)))
        total += coopvec.to("cpu", torch.float64).sum(0)
        seen += coopvec.shape[0]
    if not seen:
        raise ValueError("merge: the calibration loader is empty")
    return total / seen


def task_arithmetic(
    pool: ExpertPool, pretrained: Mapping[str, Tensor], scale: float = 0.3
) -> dict[str, Tensor]:
    """theta_0 + scale * sum_i (theta_i - theta_0) (task arithmetic, arXiv 2212.04089).

    Args:
        pretrained: state dict of the experts' common ancestor.

    Returns:
        Name -> tensor in the pool's dtype, summed in fp32 (fp64 for fp64) and rounded once. Float
        buffers are the experts' mean, not extrapolated:
        a variance may not turn negative. Integer buffers come from expert 0.

    Raises:
        ValueError: every tensor that is missing or has another shape.
    """
    faults = [
        f"{s.name} is missing"
        if s.name not in pretrained
        else f"{s.name} must be {tuple(s.shape)}, got {_checks.shape(pretrained[s.name])}"
        for s in pool.segments
        if s.name not in pretrained or tuple(pretrained[s.name].shape) != tuple(s.shape)
    ]
    _checks.raise_all("task_arithmetic: pretrained", faults)
    count = pool.num_experts
    merged = pool.blend(torch.full((count,), 1 / count, dtype=torch.float64))
    accumulate = _checks.accumulation_dtype(pool.params.dtype)
    for s in pool.segments:
        if s.kind == "parameter":
            base = pretrained[s.name].detach().to(pool.params.device, accumulate)
            rows = pool.params[:, s.start : s.start + s.length]
            total = sum(row.view(s.shape).to(accumulate) - base for row in rows)
            merged[s.name].copy_(base + scale * total)
    return merged


def resolve_head(engine: NeuLig, head: Head | str) -> tuple[Head, tuple[str, ...]]:
    """The head as the engine runs it, and the tasks whose head it is, none or several maybe.

    A head belongs to the tasks whose head has its values, on the pool's device and in the dtype
    that the engine keeps heads in.
    """
    if isinstance(head, str):
        if head not in engine.heads:
            raise ValueError(_unknown_task(engine, head))
        return engine.heads[head], (head,)
    if not isinstance(head, Head):
        raise TypeError(f"head must be a Head or a task's name, got {type(head).__name__}")
    params = engine.pool.params
    head = head.to(params.device, _checks.accumulation_dtype(params.dtype))
    return head, tuple(task for task, known in engine.heads.items() if known.same_as(head))


def _unknown_task(engine: NeuLig, task: str) -> str:
    hint = _checks.did_you_mean(task, engine.heads)
    return f"unknown task {task!r} (known: {', '.join(engine.heads)}){hint}"


def _batch_coopvecs(engine: NeuLig, images: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        with torch.no_grad():
            return engine.coopvec(images)
    _check_weights(weights, (len(images), engine.pool.num_experts), "per-sample and batch")
    return weights


def _check_weights(weights: Tensor, expected: tuple[int, ...], mode: str) -> None:
    if tuple(weights.shape) != expected or not weights.is_floating_point():
        what = "(N,)" if len(expected) == 1 else "(B, N)"
        raise ValueError(
            f"{mode} mode: weights must be a float tensor {what} = {expected}, got "
            f"{_checks.shape(weights)} {weights.dtype}"
        )
