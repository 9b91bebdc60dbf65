"""NeuLig's boosting term from cached products of heads and features; see neulig_fit's op."""

from __future__ import annotations

from ._launch import tl, triton
from ._portland import ENTROPY_EPSILON, shifted


@triton.jit
def load_products(
    products_ptr, row, real, w, n, bias_ptr, first, C,
    N: tl.constexpr, EXPERTS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """P (samples, EXPERTS, CLASSES) of the classes from ``first`` on, v = Σ_i w_i P_i, and the
    logits v / n + h, which are -inf beyond the last class."""
    ACC: tl.constexpr = products_ptr.dtype.element_ty
    i = tl.arange(0, EXPERTS)[None, :, None]
    c = first + tl.arange(0, CLASSES)
    P = tl.load(
        products_ptr + (row[:, None, None] * N + i) * C + c[None, None, :],
        mask=real[:, None, None] & (i < N) & (c < C)[None, None, :],
        other=0.0,
    )
    v = tl.sum(w[:, :, None] * P, 1)
    h = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(ACC)
    y = tl.where((c < C)[None, :], v / n[:, None] + h[None, :], -float("inf"))
    return P, v, y


@triton.jit
def gram_product(grams_ptr, row, real, w, N: tl.constexpr, EXPERTS: tl.constexpr):
    """K w of every sample."""
    i = tl.arange(0, EXPERTS)[None, :, None]
    j = tl.arange(0, EXPERTS)[None, None, :]
    place = (row[:, None, None] * N + i) * N + j
    gram = tl.load(grams_ptr + place, mask=real[:, None, None] & (i < N) & (j < N), other=0.0)
    return tl.sum(gram * w[:, None, :], 2)


@triton.jit
def boosting_term(
    products_ptr, row, real, w, n, bias_ptr, label, C, count, SUPERVISED: tl.constexpr,
    N: tl.constexpr, EXPERTS: tl.constexpr, SAMPLES: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """A sample's loss, and of its share in the mean over ``count``: Σ_c P_ic ∂y_c, Σ_c v_c ∂y_c.

    Reads the products once for the maximum, the sum and the label's logit, and once for the
    gradient; for the entropy, once more in between for <p, g>.
    """
    ACC: tl.constexpr = products_ptr.dtype.element_ty
    top = tl.full((SAMPLES,), -float("inf"), ACC)
    total = tl.zeros((SAMPLES,), ACC)
    target = tl.where((label >= 0) & (label < C), 0.0, float("nan")).to(ACC)
    first = C * 0
    while first < C:
        _, _, y = load_products(
            products_ptr, row, real, w, n, bias_ptr, first, C, N, EXPERTS, CLASSES
        )
        higher = tl.maximum(top, tl.max(y, 1))
        scale = shifted(higher)
        total = total * tl.exp(top - scale) + tl.sum(tl.exp(y - scale[:, None]), 1)
        top = higher
        hit = (first + tl.arange(0, CLASSES))[None, :] == label[:, None]
        target += tl.sum(tl.where(hit, y, 0.0), 1)
        first += CLASSES
    top = shifted(top)
    loss = top - target + tl.log(total)
    along = tl.zeros((SAMPLES,), ACC)
    if not SUPERVISED:
        loss = tl.zeros((SAMPLES,), ACC)
        first = C * 0
        while first < C:
            _, _, y = load_products(
                products_ptr, row, real, w, n, bias_ptr, first, C, N, EXPERTS, CLASSES
            )
            p = tl.exp(y - top[:, None]) / total[:, None]
            loss -= tl.sum(p * tl.log(p + ENTROPY_EPSILON), 1)
            along -= tl.sum(p * (tl.log(p + ENTROPY_EPSILON) + p / (p + ENTROPY_EPSILON)), 1)
            first += CLASSES
    pull = tl.zeros((SAMPLES, EXPERTS), ACC)
    radial = tl.zeros((SAMPLES,), ACC)
    first = C * 0
    while first < C:
        P, v, y = load_products(
            products_ptr, row, real, w, n, bias_ptr, first, C, N, EXPERTS, CLASSES
        )
        p = tl.exp(y - top[:, None]) / total[:, None]
        if SUPERVISED:
            hit = (first + tl.arange(0, CLASSES))[None, :] == label[:, None]
            slope = tl.where(hit, p - 1, p)
        else:
            g = -(tl.log(p + ENTROPY_EPSILON) + p / (p + ENTROPY_EPSILON))
            slope = p * (g - along[:, None])
        slope = slope / count
        pull += tl.sum(P * slope[:, None, :], 2)
        radial += tl.sum(v * slope, 1)
        first += CLASSES
    return loss, pull, radial
