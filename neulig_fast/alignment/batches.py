"""The images that networks are run on, out of whatever a loader yields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _checks


def images_in(data: Iterable[Any], tensors: Mapping[str, Tensor], subject: str) -> Iterator[Tensor]:
    """(B, ...) of every batch that has any: on the device of a state dict, floats in its dtype.

    Args:
        data: batches of images, or (images, ...) tuples.
        tensors: the state dict.
        subject: whom errors are of.

    Raises:
        TypeError: something else than batches of images.
    """
    one = isinstance(data, Tensor)
    if one or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
        got = f"one tensor {_checks.shape(data)}" if one else type(data).__name__
        raise TypeError(f"{subject}: data must be an iterable of batches, got {got}")
    like = next(tensor for tensor in tensors.values() if tensor.is_floating_point())
    for batch in data:
        images = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(images, Tensor) or not images.ndim:
            got = "a tensor ()" if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"{subject}: data must yield tensors of images, got {got}")
        if len(images):
            dtype = like.dtype if images.is_floating_point() else images.dtype
            yield images.to(like.device, dtype)


def exactly(device: torch.device) -> torch.autocast:
    """A context in which layers compute in the type of their weights, whatever is around it."""
    return torch.autocast(device.type, enabled=False)
