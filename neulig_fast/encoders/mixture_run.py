"""What a rule runs on for merged models, one per sample."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops._layers import weighted
from ..ops.blend import blend
from ..ops.mixture_layer_norm import mixture_layer_norm
from ..ops.mixture_linear import mixture_linear
from .convolution import Geometry
from .merged_rows import variance_of_means
from .runs import Run, Stack

if TYPE_CHECKING:
    pass


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

    def embedding(self, indices: Tensor, weight: Tensor) -> Tensor:
        w = self._coef.T.view(*self._coef.T.shape, *[1] * indices.ndim)
        looked_up = (F.embedding(indices, table).to(w.dtype) for table in weight)
        terms = (weighted(*pair) for pair in zip(w, looked_up, strict=True))
        return functools.reduce(torch.add, terms).to(weight.dtype)

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
