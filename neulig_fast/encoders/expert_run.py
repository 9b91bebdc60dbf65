"""What a rule runs on for N experts at once."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.expert_layer_norm import expert_layer_norm
from ..ops.expert_linear import expert_linear
from .convolution import Geometry
from .runs import Run, Stack


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

    def embedding(self, indices: Tensor, weight: Tensor) -> Tensor:
        parts = self.to_rows(indices).view(len(weight), self._images, *indices.shape[1:])
        return torch.cat([F.embedding(part, weight[i]) for i, part in enumerate(parts)])

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
