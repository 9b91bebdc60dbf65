"""The gradients of ``neulig_loss``, in closed form.

With p = softmax(y), ê = e/‖e‖ and the incoming gradients k_b = g_loss + g_boosting,
k_a = g_loss + g_alignment and g_w (of the CoopVec)::

    supervised  ∂L_b/∂y_b = (p_b - onehot(t_b)) / B
    entropy     g_bc = -[log(p_bc+δ) + p_bc/(p_bc+δ)] / B,   ∂L_b/∂y_b = p_b ⊙ (g_b - <p_b, g_b>)
    head        d_b = k_b (I - ê_b ê_b')/‖e_b‖ H' ∂L_b/∂y_b     (else k_b H' ∂L_b/∂y_b)
    CoopVec     q_bi = <z_bi, d_b> + k_a/(λB) ((A + A') v_b)_i + g_w,bi
    softmax     ∂a_bi = w_bi (q_bi - Σ_j w_bj q_bj)
    Portland    ∂W = Σ_b ∂a_b u_b',   ∂c = Σ_b ∂a_b

v_b is w_b, or w_b - mean_b w_b when centered; the mean adds nothing to the gradient, since
Σ_b v_b = 0. NeuLig (arXiv 2503.01268).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._checks import accumulation_dtype, shape
from .._registry import Op

ENTROPY_EPSILON = 1e-6  # the δ of the entropy term, as published
_MAX_EXPERTS = 64  # of the C++ kernels


def ensemble_logits(
    w: Tensor, z: Tensor, H: Tensor, h: Tensor | None, normalize: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """e_b = Σ_i w_bi z_bi, then ê_b = e_b/‖e_b‖ and y_b = H ê_b + h: ``(ê or e, ‖e‖, y)``."""
    e = (w.unsqueeze(1) @ z).squeeze(1)
    norm = torch.linalg.vector_norm(e, dim=1, keepdim=True) if normalize else None
    if norm is not None:
        e = e / norm
    y = e @ H.T if h is None else torch.addmm(h, e, H.T)
    return e, norm, y


def logit_gradient(y: Tensor, targets: Tensor | None, boosting: str) -> Tensor:
    """∂L_b/∂y."""
    p = torch.softmax(y, dim=1)
    if boosting == "supervised":
        p[torch.arange(p.shape[0], device=p.device), targets] -= 1
        return p / p.shape[0]
    g = ((p + ENTROPY_EPSILON).log() + p / (p + ENTROPY_EPSILON)) / -p.shape[0]
    return p * (g - (p * g).sum(1, keepdim=True))


def _tangent(d: Tensor, e: Tensor) -> Tensor:
    """(I - ê ê') d, row by row."""
    return d - e * (e * d).sum(1, keepdim=True)


def _incoming(like: Tensor, *grads: Tensor | None) -> Tensor:
    """The sum of the gradients that autograd hands over."""
    return sum((g for g in grads if g is not None), like.new_zeros(()))


def neulig_loss_backward_reference(
    grad_loss: Tensor | None,
    grad_boosting: Tensor | None,
    grad_alignment: Tensor | None,
    grad_coopvec: Tensor | None,
    coopvec: Tensor,
    features: Tensor,
    portland_weight: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    targets: Tensor | None,
    alignment: Tensor,
    boosting: str,
    scaling: float,
    normalize: bool,
    centered: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """``(∂features, ∂portland_weight, ∂portland_bias, ∂head_weight, ∂head_bias, ∂alignment)``.

    All in the accumulation dtype; where ``needs`` is False, an empty tensor.
    """
    B, w = features.shape[0], coopvec
    z, W, H, A = (t.to(w.dtype) for t in (features, portland_weight, head_weight, alignment))
    h = None if head_bias is None else head_bias.to(w.dtype)
    k_b = _incoming(w, grad_loss, grad_boosting)
    k_a = _incoming(w, grad_loss, grad_alignment) / (scaling * B)

    e, norm, y = ensemble_logits(w, z, H, h, normalize)
    dy = k_b * logit_gradient(y, targets, boosting)
    d = dy @ H if norm is None else _tangent(dy @ H, e) / norm
    v = w - w.mean(0) if centered else w
    q = (z @ d.unsqueeze(2)).squeeze(2) + k_a * (v @ (A + A.T)) + _incoming(w, grad_coopvec)
    da = w * (q - (w * q).sum(1, keepdim=True))

    gradients = (
        lambda: w.unsqueeze(2) * d.unsqueeze(1) + (da @ W).view_as(z),
        lambda: da.T @ z.flatten(1),
        lambda: da.sum(0),
        lambda: dy.T @ e,
        lambda: dy.sum(0),
        lambda: k_a * (v.T @ v),
    )
    return tuple(f() if need else w.new_empty(0) for f, need in zip(gradients, needs, strict=True))


def _fake(
    grad_loss, grad_boosting, grad_alignment, grad_coopvec, coopvec, features, portland_weight,
    head_weight, head_bias, targets, alignment, boosting, scaling, normalize, centered, needs,
):  # fmt: skip
    N, C = alignment.shape[0], head_weight.shape[0]
    shapes = (features.shape, portland_weight.shape, (N,), head_weight.shape, (C,), (N, N))
    return tuple(
        coopvec.new_empty(shape if need else (0,))
        for shape, need in zip(shapes, needs, strict=True)
    )


def _faults(*args: Any) -> Iterator[str]:
    coopvec, features = args[4:6]
    if features.ndim != 3 or coopvec.shape != features.shape[:2]:
        yield (
            "coopvec must be (B, N) and features (B, N, D), "
            f"got {shape(coopvec)} and {shape(features)}"
        )


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple]:
    g = torch.Generator().manual_seed(7)
    acc = accumulation_dtype(dtype)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype)

    for B, N, D, C, boosting, normalize, centered in (
        (4, 3, 5, 6, "supervised", True, False),
        (7, 2, 17, 1, "entropy", True, True),
        (1, 1, 3, 4, "supervised", False, False),
    ):
        w = torch.softmax(draw(B, N, dtype=acc), 1)
        grads = [draw(dtype=acc) for _ in range(3)] + [draw(B, N, dtype=acc)]
        targets = torch.arange(B, device=device) % C if boosting == "supervised" else None
        bias = None if centered else draw(C)
        yield (
            *grads, w, draw(B, N, D), draw(N, N * D), draw(C, D), bias, targets, draw(N, N),
            boosting, 10.0, normalize, centered, [True, True, True, True, bias is not None, True],
        )  # fmt: skip


def why_not_cpu(features: Tensor, head_weight: Tensor) -> str | None:
    """Why the C++ kernels cannot take a call with these, or None."""
    _, N, D = features.shape
    if N > _MAX_EXPERTS:
        return f"N={N} > {_MAX_EXPERTS} experts"
    if (D > 1 and features.stride(2) != 1) or (N > 1 and features.stride(1) != D):
        return "the features (N, D) of a sample must be contiguous"
    if D > 1 and head_weight.stride(1) != 1:
        return f"head_weight must have stride 1 along columns, got {head_weight.stride(1)}"
    return None


def for_cpu(features: Tensor, head_weight: Tensor, *others: Tensor | None) -> list[Any]:
    """``[head_weight, *others]`` as the C++ kernels take them: in the dtype of sums, contiguous.

    Of what may be large, the features and the head, only a head of another dtype is copied.
    """
    acc = accumulation_dtype(features.dtype)

    def converted(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return (x.to(acc) if x.is_floating_point() else x).contiguous()

    return [head_weight.to(acc), *map(converted, others)]


def _prepare(*args: Any) -> tuple[Any, ...]:
    *grads, w, z, W, H, h, t, A = args[:11]
    H, w, W, h, t, A, *grads = for_cpu(z, H, w, W, h, t, A, *grads)
    return (*grads, w, z, W, H, h, t, A, *args[11:])


OP = Op(
    "neulig_loss_backward",
    "(Tensor? grad_loss, Tensor? grad_boosting, Tensor? grad_alignment, Tensor? grad_coopvec, "
    "Tensor coopvec, Tensor features, Tensor portland_weight, Tensor head_weight, "
    "Tensor? head_bias, Tensor? targets, Tensor alignment, str boosting, float scaling, "
    "bool normalize, bool centered, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=neulig_loss_backward_reference,
    fake=_fake,
    faults=_faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")},
    samples=_samples,
    terms=lambda *args: args[5].shape[0] * args[5].shape[1] * args[5].shape[2],
    not_offered={"cuda": "not written yet"},
)
OP.add_triton(
    why_not=lambda kernels, g, gb, ga, gw, w, z, W, H, *_: kernels.why_not(z, W, H),
)
OP.add_native("cpu", prepare=_prepare, why_not=lambda *args: why_not_cpu(args[5], args[7]))
