"""Inputs for a model that nobody gave one for, from what its first layer asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# Of models that take images of any size, or do not say which.
_SIZES = (32, 28, 64, 224)
_BATCH = 2
# What models say of inputs of another shape than theirs; timm checks sizes by assertion.
_UNFIT = (RuntimeError, AssertionError, ValueError, TypeError, LookupError)


class InconclusiveError(ValueError):
    """Nothing can be said of a specification, for or against it."""


def example_inputs(model: nn.Module, generator: torch.Generator) -> Tensor:
    """A batch for ``model``, which is in float64: vectors, words or images.

    Raises:
        InconclusiveError: the first layer says too little, or the model takes nothing that it
            suggests.
    """
    failure: Exception | None = None
    for inputs in _candidates(model, generator):
        try:
            with torch.no_grad():
                model(inputs.clone())
        except _UNFIT as error:
            failure = error
        else:
            return inputs
    raise InconclusiveError(
        "verify: no inputs could be made up for this model; pass inputs=, a tensor or a tuple, as "
        "it takes them"
    ) from failure


def _candidates(model: nn.Module, generator: torch.Generator) -> Iterator[Tensor]:
    def noise(*shape: int) -> Tensor:
        return torch.randn(_BATCH, *shape, generator=generator, dtype=torch.float64, device="cpu")

    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield noise(module.in_features)
            yield noise(5, module.in_features)
        elif isinstance(module, nn.Embedding):
            yield torch.randint(
                module.num_embeddings, (_BATCH, 5), generator=generator, device="cpu"
            )
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            dimensions = len(module.kernel_size)
            for size in _image_sizes(model, dimensions):
                yield noise(module.in_channels, *size)
        else:
            continue
        return


def _image_sizes(model: nn.Module, dimensions: int) -> Iterable[tuple[int, ...]]:
    """What modules say of the size of their images; the usual sizes where none does."""
    found: dict[tuple[int, ...], None] = {}
    for module in model.modules():
        for name in ("image_size", "img_size"):
            size = getattr(module, name, None)
            if isinstance(size, int):
                size = (size,) * dimensions
            if isinstance(size, tuple | list) and len(size) == dimensions:
                found[tuple(size)] = None
    return found or [(size,) * dimensions for size in _SIZES]


def as_float64(inputs: Any) -> tuple[Any, ...]:
    """Positional arguments, all on the CPU, those of a floating type in float64."""

    def convert(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.detach().to("cpu", torch.float64 if x.is_floating_point() else x.dtype)

    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    return pytree.tree_map(convert, arguments)
