"""A linear layer of a base and task vectors, merged for every sample as its coefficients say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks
from .ops.mixture_linear import mixture_linear


class MergedLinear(nn.Module):
    """y_b = x_b (W + sum_i c_bi D_i)^T + b + sum_i c_bi d_i, the merged layers never made.

    Of weight-ensembling mixtures of experts (WE-MoE, arXiv 2402.00433) and of per-sample task
    arithmetic. The layers' tensors are copied, into buffers that get no gradient.

    Args:
        base: (O, I), what is merged into.
        task_vectors: N >= 1 layers like it, whose weights D_i and biases d_i are differences from
            the base's.

    Attributes:
        weight, bias: (1 + N, O, I) and (1 + N, O), or None: the base's, then the task vectors'.

    Raises:
        TypeError: something else than ``nn.Linear``.
        ValueError: layers of several shapes or dtypes, on several devices, with and without bias;
            no task vectors; all of them listed.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, base: nn.Linear, task_vectors: Iterable[nn.Linear]) -> None:
        super().__init__()
        layers: list[Any] = [base, *task_vectors]
        other = [type(layer).__name__ for layer in layers if not isinstance(layer, nn.Linear)]
        if other:
            wanted = "base and task_vectors must be nn.Linear layers"
            raise TypeError(f"MergedLinear: {wanted}, got {', '.join(other)}")
        _checks.raise_all("MergedLinear", _faults(layers))
        self.register_buffer("weight", torch.stack([layer.weight.detach() for layer in layers]))
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.register_buffer("bias", torch.stack(biases) if biases else None)

    def forward(self, x: Tensor, coef: Tensor) -> Tensor:
        """The merged layers of a batch.

        Args:
            x: (B, ..., I) in the layers' dtype.
            coef: (B, N), or (N,) for all samples alike; any float dtype.

        Returns:
            (B, ..., O), differentiable in ``x`` and ``coef``.

        Raises:
            TypeError: an argument that is no tensor.
            ValueError: shapes, dtypes or devices that do not fit.
        """
        _checks.check_tensors("MergedLinear", x=x, coef=coef)
        if coef.ndim not in (1, 2) or coef.shape[-1] != len(self.weight) - 1:
            wanted = f"(B, N) or (N,) with N = {len(self.weight) - 1}"
            raise ValueError(f"MergedLinear: coef must be {wanted}, got {_checks.shape(coef)}")
        whole = torch.cat([torch.ones_like(coef[..., :1]), coef], dim=-1)
        return mixture_linear(x, self.weight, self.bias, whole)

    def extra_repr(self) -> str:
        experts, out, width = self.weight.shape
        return f"{width}, {out}, bias={self.bias is not None}, task_vectors={experts - 1}"


def _faults(layers: Sequence[nn.Linear]) -> Iterator[str]:
    if len(layers) == 1:
        yield "task_vectors must be N >= 1 layers, got none"
    base = layers[0].weight
    for i, layer in enumerate(layers):
        own, bias = layer.weight, layer.bias
        if bias is not None and (bias.dtype, bias.device) != (own.dtype, own.device):
            who = f"task vector {i - 1}" if i else "the base"
            yield (
                f"{who} has a bias of {bias.dtype} on {bias.device}, its weight {own.dtype} on "
                f"{own.device}"
            )
    for i, layer in enumerate(layers[1:]):
        like = layer.weight
        if like.shape != base.shape:
            sizes = f"{_checks.shape(like)}, the base {_checks.shape(base)}"
            yield f"task vector {i} has weights {sizes}"
        if (like.dtype, like.device) != (base.dtype, base.device):
            yield (
                f"task vector {i} is {like.dtype} on {like.device}, the base {base.dtype} on "
                f"{base.device}"
            )
        if (layer.bias is None) != (layers[0].bias is None):
            yield f"task vector {i} {'lacks' if layer.bias is None else 'has'} a bias"
