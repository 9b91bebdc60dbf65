"""What a rule runs on: the parameters of N experts, or of one merged model per sample.

Activations are plain batches whose rows, the first dimension, belong to one model each: (N·B, ...)
in an :class:`ExpertRun`, expert by expert, and (B, ...) in a :class:`MixtureRun`. What all experts
share, as the images, may also have B rows in an :class:`ExpertRun` until parameters meet it.

Parameters are stacks (N, *shape), views of the arena's columns (:func:`stack_of`). A stack may be
sliced or reshaped behind its first dimension before it is used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks
from ..ops.blend import blend
from ..ops.expert_layer_norm import expert_layer_norm
from ..ops.expert_linear import expert_linear
from ..ops.mixture_layer_norm import mixture_layer_norm
from ..ops.mixture_linear import mixture_linear
from .convolution import Geometry, windows
from .merged_rows import variance_of_means
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


class ExpertRun(Run):
    """All N experts on the same B images: row i * B + b is image b in expert i."""

    def __init__(self, stack: Stack, experts: int, images: int) -> None:
        super().__init__(stack, experts * images)
        self._experts, self._images = experts, images

    def to_rows(self, x: Tensor) -> Tensor:
        if x.shape[0] == self.rows:
            return x
        return x.expand(self._experts, *x.shape).reshape(self.rows, *x.shape[1:])

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        between = x.shape[1:-1]
        shared = x.shape[0] != self.rows
        shape = (self._images, between.numel(), x.shape[-1])
        x = x.reshape(shape if shared else (self._experts, *shape))
        y = expert_linear(x, weight, bias, activation=activation)
        return y.view(self.rows, *between, y.shape[-1])

    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        N, x = self._experts, self.to_rows(x)
        shape = (N, self._images, *x.shape[1:])
        if residual is not None:
            residual = self.to_rows(residual).reshape(shape)
        result = expert_layer_norm(x.reshape(shape), weight, bias, eps, residual=residual)
        y, s = result if isinstance(result, tuple) else (result, x)
        return y.view(x.shape), s.view(x.shape)

    def per_row(self, stack: Tensor) -> Tensor:
        return stack.repeat_interleave(self._images, 0)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        N = self._experts
        shared = x.shape[0] != self.rows
        parts = [x] * N if shared else x.view(N, self._images, *x.shape[1:])
        return torch.cat(
            [
                F.conv2d(part, weight[i], None if bias is None else bias[i], *g)
                for i, part in enumerate(parts)
            ]
        )


class MixtureRun(Run):
    """B merged models, sum_i coef[b, i] theta_i for image b, each on its own image.

    ``coef`` (B, N) in the arithmetic's type, on the pool's device.
    """

    def __init__(self, stack: Stack, coef: Tensor, batchnorm: str) -> None:
        super().__init__(stack, coef.shape[0])
        self._coef, self._batchnorm = coef, batchnorm

    def to_rows(self, x: Tensor) -> Tensor:
        return x

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        return mixture_linear(x, weight, bias, self._coef, activation=activation)

    def layer_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        result = mixture_layer_norm(x, weight, bias, self._coef, eps, residual=residual)
        return result if isinstance(result, tuple) else (result, x)

    def per_row(self, stack: Tensor) -> Tensor:
        mixed = blend(self._coef, stack.reshape(len(stack), -1))
        return mixed.view(self.rows, *stack.shape[1:])

    def _extra_variance(self, mean: Tensor) -> Tensor | float:
        if self._batchnorm == "blend":
            return 0.0
        return variance_of_means(self._coef, mean)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        """By mixed kernels, or by windows where those are the smaller of the two.

        For every weight of a filter, a sample's mixed kernels have O values and its windows one for
        each output position. Either is written and read once on top of the same products, so the
        smaller one is taken. Mixing costs N operations per value of a kernel, once per sample; the
        other exact way, the experts' input channels side by side, costs N operations per value and
        position. Positions outnumber experts, so that way is not taken.
        """
        B, channels = self.rows, weight.shape[1]
        if g.groups == 1 and g.positions(x.shape[-2:], weight.shape[-2:]) <= channels:
            return self._by_windows(x, weight, bias, g)
        if not B:
            return F.conv2d(x, weight[0], None, *g)
        # Samples are the groups of one convolution: on a GPU a loop would be a launch for each.
        kernels = self.per_row(weight).flatten(0, 1)
        shifts = None if bias is None else self.per_row(bias).flatten()
        groups = g._replace(groups=g.groups * B)
        side_by_side = x.reshape(1, B * x.shape[1], *x.shape[2:])
        y = F.conv2d(side_by_side, kernels, shifts, *groups)
        return y.view(B, channels, *y.shape[2:])
