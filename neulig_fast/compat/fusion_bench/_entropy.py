"""The entropy of predictions, which AdaMerging and its relatives minimise.

    loss = -(1/B) sum_b sum_c p_bc log(p_bc + eps)        p = softmax(y), arXiv 2310.02575

The same operations as the original's, in place where it makes a new tensor each, and one step back
for all of them, in autograd's order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._seam import Seam, Unsupported
from .._tensors import check_plain

_METHOD = "fusion_bench.method"
_PLAIN = ("we_moe.we_moe", "rankone_moe.rankone_moe", "sparse_we_moe.sparse_we_moe")
_WITH_EPS = ("adamerging.entropy_loss", "we_moe.entropy_loss", "gossip.entropy_loss")
_WITH_PRED = ("fw_merging.fw_soft", "fw_merging.fw_hard")
_EPS = 1e-8


def seams() -> list[Seam]:
    """Of all copies."""
    copies: dict[Callable[..., Tensor], tuple[str, ...]] = {
        entropy_loss: (*_PLAIN, "gossip.task_wise_gossip"),
        entropy_loss_with_eps: _WITH_EPS,
        entropy_loss_with_pred: _WITH_PRED,
    }
    return [
        Seam(f"{_METHOD}.{module}:entropy_loss", function, function)
        for function, modules in copies.items()
        for module in modules
    ]


def entropy_loss(logits: Tensor) -> Tensor:
    """Of logits (..., C)."""
    return _loss(logits, _EPS)


def entropy_loss_with_eps(logits: Tensor, eps: float = _EPS) -> Tensor:
    """Of logits (B, C)."""
    return _loss(logits, eps, dimensions=2)


def entropy_loss_with_pred(logits: Tensor, pred: Any = None, eps: float = _EPS) -> Tensor:
    """The same; ``pred`` has no part in it."""
    del pred
    return _loss(logits, eps, dimensions=2)


def _loss(logits: Tensor, eps: Any, dimensions: int | None = None) -> Tensor:
    check_plain(logits, grad=True)
    if not isinstance(eps, (int, float)):
        raise Unsupported("an eps that is no number")
    if dimensions not in (None, logits.ndim) or not logits.ndim or not logits.numel():
        raise Unsupported("logits of another form, or none")
    if logits.dtype.itemsize < 4 or torch.is_autocast_enabled(logits.device.type):
        raise Unsupported("16-bit logits, or autocast")
    if torch.is_grad_enabled() and logits.requires_grad:
        return _Entropy.apply(logits, eps)
    return _forward(torch.softmax(logits, dim=-1), eps)


def _forward(p: Tensor, eps: float) -> Tensor:
    return -torch.sum(torch.add(p, eps).log_().mul_(p), dim=-1).mean()


class _Entropy(torch.autograd.Function):
    """Keeps probabilities alone."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, eps: float) -> Tensor:
        p = torch.softmax(logits, dim=-1)
        ctx.save_for_backward(p)
        ctx.eps = eps
        return _forward(p, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        each = -(grad / (p.numel() // p.shape[-1]))
        shifted = p + ctx.eps
        back = (each * p).div_(shifted).add_(shifted.log_().mul_(each))
        return torch._softmax_backward_data(back, p, -1, p.dtype), None
