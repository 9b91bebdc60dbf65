"""Running an encoder with the tensors of an expert, or of a merged model, in place of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .._checks import shape


def run(encoder: nn.Module, state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """(B, D): ``encoder`` in the modes its submodules are in, with the tensors of ``state``.

    Without autocast: their dtype is the type of the arithmetic, as it is where rules run.
    Where the encoder returns a tuple (pooled, tokens), the first entry counts.

    Raises:
        ValueError: the encoder does not map the batch to (B, D).
    """
    with torch.autocast(images.device.type, enabled=False):
        output = call(encoder, state, images)
    features = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
        got = shape(features) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"features: the encoder must map {shape(images)} to ({len(images)}, D), got {got}"
        )
    return features


def call(module: nn.Module, state: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """``module(*args, **kwargs)`` with the tensors of ``state`` in place of its own.

    Buffers that ``state`` lacks, not being saved, follow its device and dtype for the call.
    """
    tensors = {**_unsaved_buffers(module, state), **state}
    return functional_call(module, tensors, args, kwargs, tie_weights=False)


def _unsaved_buffers(encoder: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    like = next(tensor for tensor in state.values() if tensor.is_floating_point())
    return {
        name: buffer.to(like.device, like.dtype if buffer.is_floating_point() else buffer.dtype)
        for name, buffer in encoder.named_buffers(remove_duplicate=False)
        if name not in state
    }


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode in every submodule; each gets its own mode back. Not for concurrent threads.

    Only the flags are set: a ``train`` or ``eval`` of the module's own may do more than that.
    """
    training = [submodule for submodule in module.modules() if submodule.training]
    try:
        for submodule in training:
            submodule.training = False
        yield
    finally:
        for submodule in training:
            submodule.training = True
