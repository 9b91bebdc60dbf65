"""Running averages of a model in training, for ``torch.optim.swa_utils.AveragedModel`` and others.

An exponential average (Polyak and Juditsky 1992) moves by a share ``1 - decay`` of the way to the
model in every step, the average of stochastic weight averaging (Izmailov et al., arXiv 1803.05407)
by ``1 / (n + 1)``: :func:`neulig_fast.lerp_lists_` does either in one pass over all tensors, in
fp32 arithmetic, and rounds at random on request, without which an average in bf16 stands still.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import swa_utils

from . import _checks
from .ops import _lerp, lerp_lists_
from .ops._sharded import is_dtensor

Rounding = Literal["nearest", "stochastic"]
_ROUNDINGS = ("nearest", "stochastic")
_STEPS = 2**32


class MultiAverage:
    """``fn(averages, models, num_averaged)``: moves every average, in place.

    Lists of T tensors as ``AveragedModel`` hands them to its ``multi_avg_fn``: any layout and float
    or complex type, DTensors placed alike. Integers move as fp64 numbers and are cut off.

    ``decay``: what is kept of an average in a step; None: of all models so far, n / (n + 1).
    """

    def __init__(self, decay: float | None, rounding: Rounding = "nearest", seed: int = 0) -> None:
        self.decay, self.rounding, self.seed = decay, rounding, seed
        # By device and type: which memory the last call was about, and the tables of it.
        self._known: dict[Any, tuple[Any, list[_lerp.Table]]] = {}

    def __reduce__(self) -> tuple[type[MultiAverage], tuple[Any, ...]]:
        return MultiAverage, (self.decay, self.rounding, self.seed)

    @torch.no_grad()
    def __call__(
        self, averages: Sequence[Tensor], models: Sequence[Tensor], num_averaged: Tensor | int
    ) -> None:
        """Move ``averages`` towards ``models``; ``num_averaged`` counts the models before."""
        if not averages:
            return
        first = averages[0]
        share = self._share(num_averaged, first.device)
        if not first.is_floating_point() and not first.is_complex():
            for average, model in zip(averages, models, strict=True):
                average.copy_(average.double().lerp(model.double(), share))
            return
        random = self.rounding == "stochastic" and first.dtype in (torch.bfloat16, torch.float16)
        seed, step = (self.seed, int(num_averaged) % _STEPS) if random else (None, 0)
        if torch.compiler.is_compiling() or is_dtensor(*averages, *models):
            lerp_lists_(averages, models, share, seed, step)
            return
        runs, copies = _runs(averages, models)
        self._move(runs, share, seed, step)
        for average, copy in copies:
            average.copy_(copy)

    def _share(self, num_averaged: Tensor | int, device: torch.device) -> Tensor:
        """Of the way to the model, a fp64 number on the device; the host does not wait for it."""
        if self.decay is not None:
            return torch.full((), 1 - self.decay, dtype=torch.float64, device=device)
        if isinstance(num_averaged, Tensor):
            return (num_averaged.reshape(()).to(device, torch.float64) + 1).reciprocal()
        return torch.full((), 1 / (num_averaged + 1), dtype=torch.float64, device=device)

    def _move(
        self, runs: Sequence[tuple[Tensor, Tensor]], share: Tensor, seed: int | None, step: int
    ) -> None:
        """Of one device and type: through tables that are made once for the same memory."""
        averages, models = [a for a, _ in runs], [m for _, m in runs]
        slot = (averages[0].device, averages[0].dtype)
        memory = [(x.data_ptr(), x.numel(), x.dtype) for x in (*averages, *models)]
        known, tables = self._known.get(slot, (None, []))
        if memory != known:
            _checks.raise_all("multi_avg_fn", _lerp.faults(averages, models, share))
            _lerp.check_memory(averages, models, share)
            tables = _lerp.tables(averages, models, averages)
            self._known[slot] = memory, tables
        _lerp.write(share, averages, tables, models, seed, step)


def ema_multi_avg_fn(
    decay: float = 0.999, *, rounding: Rounding = "nearest", seed: int = 0
) -> MultiAverage:
    """The exponential average, for ``AveragedModel(model, multi_avg_fn=...)``.

    Args:
        decay: what is kept of the average in a step, from 0 to 1.
        rounding: of averages in bf16 and fp16: "nearest", or "stochastic", so that steps below
            half of the last place add up to what they should. Others are rounded to nearest.
        seed: of stochastic rounding. The random bits depend on it, the number of averaged models,
            the tensor's place in its list and the element's in the tensor alone.

    Returns:
        ``fn(averages, models, num_averaged)``, in place: ``a + (1 - decay) (m - a)`` in fp32 (fp64
        for fp64), rounded once.

    Raises:
        ValueError: a decay outside [0, 1], an unknown rounding, a seed of more than 64 bits.
    """
    found = _rounding_faults(rounding, seed)
    if not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
        found.insert(0, f"decay must be a number from 0 to 1, got {decay!r}")
    _checks.raise_all("ema_multi_avg_fn", found)
    return MultiAverage(decay, rounding, seed)


def swa_multi_avg_fn(*, rounding: Rounding = "nearest", seed: int = 0) -> MultiAverage:
    """The average of all models so far, for ``AveragedModel(model, multi_avg_fn=...)``.

    Args:
        rounding, seed: as for :func:`neulig_fast.ema_multi_avg_fn`.

    Returns:
        ``fn(averages, models, num_averaged)``, in place: ``a + (m - a) / (num_averaged + 1)``.

    Raises:
        ValueError: an unknown rounding, a seed of more than 64 bits.
    """
    _checks.raise_all("swa_multi_avg_fn", _rounding_faults(rounding, seed))
    return MultiAverage(None, rounding, seed)


def _rounding_faults(rounding: Any, seed: Any) -> list[str]:
    found = []
    if rounding not in _ROUNDINGS:
        hint = _checks.did_you_mean(str(rounding), _ROUNDINGS)
        found.append(f"rounding must be nearest or stochastic, got {rounding!r}{hint}")
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        found.append(f"seed must be a signed 64-bit integer, got {seed!r}")
    return found


def _runs(
    averages: Iterable[Tensor], models: Iterable[Tensor]
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Pairs of contiguous tensors, and which averages only copies of could be handed on.

    Dense tensors of one order of elements, such as channels_last, are runs of memory as they are.
    """
    runs, copies = [], []
    for average, model in zip(averages, models, strict=True):
        own = _resolved(average)
        a, m = (torch.view_as_real(x) if x.is_complex() else x for x in (own, _resolved(model)))
        if not (a.is_contiguous() and m.is_contiguous()):
            if _is_one_run(a) and a.shape == m.shape and a.stride() == m.stride():
                a, m = (x.as_strided((x.numel(),), (1,)) for x in (a, m))
            else:
                view, a, m = a, a.clone(memory_format=torch.contiguous_format), m.contiguous()
                copies.append((view, a))
        if own is not average:
            copies.append((average, own))
        runs.append((a, m))
    return runs, copies


def _resolved(tensor: Tensor) -> Tensor:
    """With its values in memory: not the negative, nor the conjugate, of what is there."""
    if tensor.is_neg() or tensor.is_conj():
        return tensor.resolve_conj().resolve_neg()
    return tensor


def _is_one_run(tensor: Tensor) -> bool:
    """Whether the elements fill their memory, in whatever order."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != reach:
            return False
        reach *= size
    return True


class AveragedModel(swa_utils.AveragedModel):
    """``torch.optim.swa_utils.AveragedModel`` without a wait for the GPU in every step.

    The number of averaged models is known on the host; ``state_dict`` is that of torch's class,
    either loads the other's. Without ``avg_fn`` and ``multi_avg_fn`` it is the average of all
    models: :func:`neulig_fast.swa_multi_avg_fn`. Parameters may be DTensors, and the average may be
    kept on another device (``device="cpu"``).

    Args:
        model, device, avg_fn, multi_avg_fn, use_buffers: as of torch's class.
    """

    def update_parameters(self, model: nn.Module) -> None:
        """Average ``model`` in; the first one is copied."""
        update_parameters(self, model)


# -- what AveragedModel does in a step -------------------------------------------------------------


_DEFAULT = MultiAverage(None)  # of models that have no function


def update_parameters(averaged: swa_utils.AveragedModel, model: nn.Module) -> None:
    """What ``averaged.update_parameters(model)`` means."""
    count = _count(averaged)
    pairs = list(_pairs(averaged, model))
    if count == 0:
        for average, tensor in pairs:
            average.copy_(tensor)
    elif averaged.avg_fn is not None and averaged.multi_avg_fn is None:
        for average, tensor in pairs:
            average.copy_(averaged.avg_fn(average, tensor, averaged.n_averaged.to(average.device)))
    else:
        function = averaged.multi_avg_fn or _DEFAULT
        for device, averages, tensors in _groups(pairs):
            ours = isinstance(function, MultiAverage)
            function(averages, tensors, count if ours else averaged.n_averaged.to(device))
    if not averaged.use_buffers:
        for kept, buffer in zip(averaged.module.buffers(), model.buffers(), strict=True):
            kept.detach().copy_(buffer.detach().to(kept.device))
    averaged.n_averaged += 1
    _keep_count(averaged, count + 1)


def _pairs(averaged: swa_utils.AveragedModel, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    mine: Iterable[Tensor] = averaged.parameters()
    theirs: Iterable[Tensor] = model.parameters()
    if averaged.use_buffers:
        mine = itertools.chain(averaged.module.parameters(), averaged.module.buffers())
        theirs = itertools.chain(theirs, model.buffers())
    for average, tensor in zip(mine, theirs, strict=False):  # as torch has it
        yield average.detach(), tensor.detach().to(average.device)


def _groups(
    pairs: Iterable[tuple[Tensor, Tensor]],
) -> Iterator[tuple[torch.device, list[Tensor], list[Tensor]]]:
    """Lists of one device and type."""
    found: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for average, tensor in pairs:
        averages, tensors = found.setdefault((average.device, average.dtype), ([], []))
        averages.append(average)
        tensors.append(tensor)
    for (device, _), (averages, tensors) in found.items():
        yield device, averages, tensors


# The buffer, how often it had been written to, and what was in it then.
_COUNTS: weakref.WeakKeyDictionary[nn.Module, tuple[Tensor, int, int]]
_COUNTS = weakref.WeakKeyDictionary()


def _count(averaged: swa_utils.AveragedModel) -> int:
    """``n_averaged``, read from a GPU only if somebody else has written to it.

    Writes through ``n_averaged.data`` are not counted by torch: there they go unseen.
    """
    buffer = averaged.n_averaged
    if buffer.device.type == "cpu":
        return int(buffer)  # nothing to wait for
    known, version, count = _COUNTS.get(averaged, (None, 0, 0))
    if known is buffer and buffer._version == version:
        return count
    return int(buffer)


def _keep_count(averaged: swa_utils.AveragedModel, count: int) -> None:
    buffer = averaged.n_averaged
    if not buffer.is_inference():  # whose writes nobody counts
        _COUNTS[averaged] = buffer, buffer._version, count
