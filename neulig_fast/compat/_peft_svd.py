"""``add_weighted_adapter(combination_type="svd")`` from the factors, without the dense matrix.

The weighted sum of adapters is ``sum_i w_i s_i B_i A_i = B A`` with B (m, R) and A (R, n) their
factors side by side, R the sum of their ranks. With ``B = Q_b R_b`` and ``A^T = Q_a R_a`` the
singular values are those of the small ``R_b R_a^T``, and its singular vectors times ``Q_b`` and
``Q_a`` are the others (Golub and Van Loan, Matrix Computations, 5.4): exact, in O((m + n) R^2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._seam import Unsupported
from ._tensors import check_finite, check_plain


def svd_adapter(
    self: Any, combination_type: str, adapters: list[str], weights: list[float], new_rank: int,
    target: Any, target_lora_A: Tensor, target_lora_B: Tensor, density: Any,
    majority_sign_method: Any, clamp: Any = None, full_matrices: bool = True,
    driver: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The two factors of a layer, as the method of ``LoraModel`` returns them."""
    if combination_type != "svd":
        raise Unsupported(f"combination_type {combination_type}: its sum has no factors")
    if clamp is not None:
        raise Unsupported("svd_clamp, which depends on the signs of singular vectors")
    given = [(a, w) for a, w in zip(adapters, weights, strict=True) if _has(target, a)]
    if not given:
        raise Unsupported("no adapter of this layer")
    pairs = _factors(target, [adapter for adapter, _ in given])
    factors = [w * target.scaling[adapter] for adapter, w in given]
    # What the host's arithmetic makes of the adapters' type and the weights'.
    numbers = torch.tensor([w for _, w in given])
    dtype = torch.promote_types(pairs[0][1].dtype, numbers.dtype)
    if dtype not in (torch.float32, torch.float64):
        raise Unsupported(f"a decomposition in {dtype}")
    left = torch.cat([b.double() * f for (_, b), f in zip(pairs, factors, strict=True)], 1)
    right = torch.cat([a.double() for a, _ in pairs])
    if new_rank > min(*left.shape, right.shape[1]):
        raise Unsupported("a rank above that of the sum")
    A, B = (part.to(dtype) for part in _decomposed(left, right, new_rank))
    if target_lora_A.ndim > 2:
        return A.reshape(target_lora_A.shape), B.reshape(target_lora_B.shape)
    return A, B


def _decomposed(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``V^T`` and ``U S`` of the product of (m, R) and (R, n), the largest values first."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return vh[:rank] @ q_right.T, (q_left @ u[:, :rank]) * s[:rank]


def _has(target: Any, adapter: str) -> bool:
    return adapter in target.lora_A or adapter in target.lora_embedding_A


def _factors(target: Any, adapters: list[str]) -> list[tuple[Tensor, Tensor]]:
    """(r, n) and (m, r) of every adapter, such that their product is its matrix."""
    from peft.tuners.lora import layer

    kind = type(target).get_delta_weight
    found = []
    for adapter in adapters:
        if kind is layer.Embedding.get_delta_weight:
            a, b = target.lora_embedding_A[adapter], target.lora_embedding_B[adapter]
        elif kind is layer.Linear.get_delta_weight:
            a, b = target.lora_A[adapter].weight, target.lora_B[adapter].weight
        elif isinstance(target, layer.Conv2d) and target.get_base_layer().groups == 1:
            a, b = target.lora_A[adapter].weight, target.lora_B[adapter].weight
            a, b = a.flatten(1), b.flatten(1)
        else:
            raise Unsupported(f"a layer of type {type(target).__name__}")
        found.append((a.detach(), b.detach()))
    tensors = [tensor for pair in found for tensor in pair]
    check_plain(*tensors, strided=True)
    check_finite(*tensors)
    return found
