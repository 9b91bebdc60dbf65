"""Forward passes of one shape from a CUDA graph, not launched from Python every time."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks, _registry
from .._registry import NeuligFastWarning
from ..pool import ExpertPool


class _Recording(NamedTuple):
    key: tuple[object, ...]
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor


class Replay:
    """A forward pass over a pool that is recorded once its batches repeat their shape.

    On a GPU few images keep it busy for less time than the launches of a whole encoder take from
    Python. Called twice in a row with tensors of the same shapes and types, ``forward`` is recorded
    as a CUDA graph, and such calls are replayed from then on; all others, and all on the CPU, run
    as they are. Results are the caller's own. Nothing is differentiable.

    One recording is kept. It holds the memory of its activations until :meth:`clear`, or until
    another shape repeats. Weights are read where they lie: values that change in place count, and
    a pool whose arena is another tensor is recorded anew.

    Args:
        pool: an ``ExpertPool`` with a template.
        forward: ``expert_forward`` or ``mixture_forward``, or what is called like them and does
            not wait for the GPU.

    Raises:
        TypeError: a pool that is no pool; in a call, arguments that are no tensors.

    Example:
        >>> forward = neulig_fast.encoders.Replay(pool, neulig_fast.mixture_forward)
        >>> features = forward(images, coef)
    """

    def __init__(self, pool: ExpertPool, forward: Callable[..., Tensor]) -> None:
        if not isinstance(pool, ExpertPool):
            raise TypeError(f"Replay: pool must be an ExpertPool, got {type(pool).__name__}")
        self._pool, self._forward = pool, forward
        self.clear()

    def clear(self) -> None:
        """Free the recording and its memory."""
        self._recording: _Recording | None = None
        self._last: tuple[object, ...] | None = None
        self._recordable = True

    @torch.no_grad()
    def __call__(self, *tensors: Tensor) -> Tensor:
        """``forward(pool, *tensors)``."""
        _checks.check_tensors("Replay", **{f"argument {i}": t for i, t in enumerate(tensors)})
        key = (
            self._pool.params.data_ptr(),
            _registry.forcing,
            torch.backends.cuda.matmul.fp32_precision,
            *((t.shape, t.dtype, t.device) for t in tensors),
        )
        found = self._recording
        if found is None or found.key != key:
            if not (self._pool.params.is_cuda and self._recordable and key == self._last):
                self._last = key
                return self._forward(self._pool, *tensors)
            found = self._record(key, tensors)
            if found is None:
                return self._forward(self._pool, *tensors)
        for own, given in zip(found.inputs, tensors, strict=True):
            own.copy_(given)
        with torch.cuda.device_of(self._pool.params):
            found.graph.replay()
        return found.output.clone()

    def _record(self, key: tuple[object, ...], tensors: tuple[Tensor, ...]) -> _Recording | None:
        """The recording for such tensors; None, after a warning, where there can be none."""
        self._recording = None  # its memory first
        graph, device = torch.cuda.CUDAGraph(), self._pool.params.device
        inputs = tuple(t.detach().to(device, copy=True) for t in tensors)
        try:
            with (
                torch.cuda.device(device),
                torch.cuda.graph(graph, capture_error_mode="thread_local"),
            ):
                output = self._forward(self._pool, *inputs)
        except RuntimeError as error:
            self._recordable = False
            text = f"Replay: the forward pass cannot be recorded and runs launch by launch: {error}"
            warnings.warn(text, NeuligFastWarning, stacklevel=3)
            return None
        self._recording = _Recording(key, graph, inputs, output)
        return self._recording
