"""What a rule runs on: the parameters of N experts, or of one merged model per sample.

Activations are plain batches whose rows, the first dimension, belong to one model each: (N·B, ...)
in an ``ExpertRun``, expert by expert, and (B, ...) in a ``MixtureRun``. What all experts
share, as the images, may also have B rows in an ``ExpertRun`` until parameters meet it.

Parameters are stacks (N, *shape), views of the arena's columns (:func:`stack_of`). A stack may be
sliced or reshaped behind its first dimension before it is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _checks
from .convolution import Geometry, windows
from .rules import join, rule_of

if TYPE_CHECKING:
    from ..pool import ExpertPool


Stack = Callable[[str], Tensor]


def stack_of(pool: ExpertPool, name: str) -> Tensor:
    """(N, *shape): the tensor ``name`` of all experts, a view of the arena's columns."""
    segment = pool.segments[pool.segments.index(name)]
    columns = pool.params[:, segment.start : segment.start + segment.length]
    return columns.view(-1, *segment.shape)


class Run(ABC):
    """One forward of many models over the same template.

    Args:
        stack: gives the stack (N, *shape) of a tensor, by its state-dict key.
        rows: how many an activation has once parameters met it.
    """

    def __init__(self, stack: Stack, rows: int) -> None:
        self._stack, self.rows = stack, rows

    # -- modules and tensors -------------------------------------------------------------------

    def apply(self, module: nn.Module, path: str, x: Tensor) -> Tensor:
        """``module``, which is at ``path`` in the template, on x, by the rule of its type.

        Raises:
            ValueError: no rule.
        """
        rule = rule_of(module)
        if rule is None:
            raise ValueError(f"{path}: no rule for {type(module).__qualname__}")
        return rule.apply(self, module, path, x)

    def child(self, module: nn.Module, path: str, name: str, x: Tensor) -> Tensor:
        """:meth:`apply` for the submodule ``name`` (dots allowed) of the module at ``path``."""
        return self.apply(module.get_submodule(name), join(path, name), x)

    def stacks(self, module: nn.Module, path: str, *names: str) -> list[Any]:
        """The tensors ``names`` of the module at ``path``: (N, *shape), or None as it has None."""
        return [
            None if getattr(module, name) is None else self._stack(join(path, name))
            for name in names
        ]

    # -- layers --------------------------------------------------------------------------------

    @abstractmethod
    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        """f(W x + b) over the last dimension: x (rows, ..., I), weight (N, O, I), bias (N, O).

        ``activation``: as in :func:`neulig_fast.mixture_linear`.
        """

    @abstractmethod
    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(y, s): the norm y over the last dimension of s = x + residual, or of s = x."""

    @abstractmethod
    def embedding(self, indices: Tensor, weight: Tensor) -> Tensor:
        """(rows, ..., D): rows of tables, weight (N, V, D), at indices (rows, ...)."""

    @abstractmethod
    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor: ...

    @abstractmethod
    def per_row(self, stack: Tensor) -> Tensor:
        """(rows, *shape): what every row's model has, of a stack (N, *shape)."""

    @abstractmethod
    def to_rows(self, x: Tensor) -> Tensor:
        """x with a row for every model: where all models share it, a view that repeats it."""

    def conv2d(self, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        """A convolution: x (rows, I, H, W), weight (N, O, I / groups, kh, kw), bias (N, O)."""
        if g.groups == 1 and not g.overlap(weight.shape[-2:]):
            return self._by_windows(x, weight, bias, g)
        return self._convolve(x, weight, bias, g)

    def _by_windows(self, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        """A convolution as a linear layer of the windows it looks at, one per output position."""
        looks = windows(x, weight.shape[-2:], g)  # (rows, H', W', I * kh * kw)
        return self.linear(looks, weight.flatten(2), bias).permute(0, 3, 1, 2)

    def batch_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        variance: Tensor,
        eps: float,
    ) -> Tensor:
        """By running statistics (N, C), channels being dimension 1 of x.

        A merged model's weight, bias, mean and variance are formed first, then its scale and shift:
        those are not linear in the statistics.
        """
        acc = _checks.accumulation_dtype(x.dtype)
        stacks = [stack for stack in (mean, variance, weight, bias) if stack is not None]
        own = self.per_row(torch.stack(stacks, 1)).to(acc)  # one blend for all four
        mean, variance, *affine = own.unbind(1)
        scale = (variance + self._extra_variance(stacks[0]) + eps).rsqrt()
        shift = -mean * scale
        if affine:
            scale, shift = scale * affine[0], shift * affine[0] + affine[1]
        scale, shift = (v.view(*v.shape, *[1] * (x.ndim - 2)) for v in (scale, shift))
        return torch.addcmul(shift, self.to_rows(x).to(acc), scale).to(x.dtype)

    def _extra_variance(self, mean: Tensor) -> Tensor | float:
        """What a merged model's variance has beside the blend of the experts' variances."""
        return 0.0

    def add(self, x: Tensor, stack: Tensor) -> Tensor:
        """x (rows, ..., *shape) plus every model's own values, of a stack (N, *shape).

        Raises:
            ValueError: x of another shape: the template is for other images.
        """
        return self.to_rows(x) + self._aligned(stack, x)

    def scale(self, x: Tensor, stack: Tensor) -> Tensor:
        """x (rows, ..., *shape) times every model's own values, of a stack (N, *shape)."""
        return self.to_rows(x) * self._aligned(stack, x)

    def _aligned(self, stack: Tensor, x: Tensor) -> Tensor:
        shape = stack.shape[1:]
        there = x.shape[max(1, x.ndim - len(shape)) :]
        if len(there) != len(shape) or any(
            own not in (1, size) for own, size in zip(shape, there, strict=True)
        ):
            raise ValueError(
                f"parameters {_checks.shape(shape)} meet activations {_checks.shape(x.shape[1:])} "
                "per image: the template is for images of another size"
            )
        return self.per_row(stack).view(self.rows, *[1] * (x.ndim - 1 - len(shape)), *shape)
