"""What the kernels of NeuLig's loss and training share: CoopVecs and the alignment term.

A program holds SAMPLES samples. Experts are padded to EXPERTS, a power of two: a padded expert
has weight 0, and its features are read as 0. Whatever is summed over columns or classes is summed
lane by lane first and over the lanes at the end, in an order that sizes alone decide.
"""

from __future__ import annotations

import torch

from ._launch import MAX_EXPERTS, missing, tl, triton

PRECISION = tl.constexpr("ieee")  # of products in fp32
ENTROPY_EPSILON = tl.constexpr(1e-6)


@triton.jit
def coopvecs(
    sample_ptrs, used, weight_ptr, bias_ptr, inputs: tl.constexpr, ACC: tl.constexpr,
    N: tl.constexpr, EXPERTS: tl.constexpr, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """w = softmax(W u + c), (SAMPLES, EXPERTS): of the ``inputs`` features from each pointer on."""
    i = tl.arange(0, EXPERTS)
    sums = tl.zeros((SAMPLES, EXPERTS, COLUMNS), ACC)
    for k in range(0, inputs, COLUMNS):
        column = k + tl.arange(0, COLUMNS)[None, :]
        real = used[:, None] & (column < inputs)
        u = tl.load(sample_ptrs[:, None] + column, mask=real, other=0.0).to(ACC)
        real = (i < N)[:, None] & (column < inputs)
        weight = tl.load(weight_ptr + i[:, None] * inputs + column, mask=real, other=0.0).to(ACC)
        sums += u[:, None, :] * weight[None, :, :]
    a = tl.sum(sums, 2) + tl.load(bias_ptr + i, mask=i < N, other=0.0).to(ACC)[None, :]
    a = tl.where((i < N)[None, :], a, -float("inf"))
    w = tl.exp(a - tl.max(a, 1)[:, None])
    return w / tl.sum(w, 1)[:, None]


@triton.jit
def steer(w, alignment_ptr, ACC: tl.constexpr, N: tl.constexpr, EXPERTS: tl.constexpr):
    """(A + A') w of every sample: its product with w is twice w' A w, and it is the gradient."""
    i = tl.arange(0, EXPERTS)[:, None]
    j = tl.arange(0, EXPERTS)[None, :]
    real = (i < N) & (j < N)
    both = tl.load(alignment_ptr + i * N + j, mask=real, other=0.0).to(ACC)
    both += tl.load(alignment_ptr + j * N + i, mask=real, other=0.0).to(ACC)
    return tl.sum(both[None, :, :] * w[:, None, :], 2)


@triton.jit
def mean_row(values_ptr, count, N: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """The mean (1, EXPERTS) of ``count`` rows of N values, ROWS at a time."""
    i = tl.arange(0, EXPERTS)[None, :]
    sums = tl.zeros((ROWS, EXPERTS), values_ptr.dtype.element_ty)
    first = count * 0
    while first < count:
        b = first + tl.arange(0, ROWS)[:, None]
        sums += tl.load(values_ptr + b * N + i, mask=(b < count) & (i < N), other=0.0)
        first += ROWS
    return tl.sum(sums, 0)[None, :] / count.to(values_ptr.dtype.element_ty)


@triton.jit
def softmax_gradient(w, pull):
    """dL/da of softmax weights ``w`` whose gradient is ``pull``, both (samples, experts)."""
    return w * (pull - tl.sum(w * pull, 1)[:, None])


@triton.jit
def shifted(top):
    """What to subtract before an exponential: ``top``, or 0 where all is -inf."""
    return tl.where(top == -float("inf"), 0.0, top)


def why_not(
    features: torch.Tensor, portland_weight: torch.Tensor, head_weight: torch.Tensor
) -> str | None:
    """Why the kernels of the loss and of its gradient cannot take these, or None."""
    if (reason := missing(features.device.type)) is not None:
        return reason
    if features.shape[1] > MAX_EXPERTS:
        return f"{features.shape[1]} experts, more than {MAX_EXPERTS}"
    named = {
        "features": features, "portland_weight": portland_weight, "head_weight": head_weight
    }  # fmt: skip
    strided = [name for name, tensor in named.items() if not tensor.is_contiguous()]
    return f"{', '.join(strided)} must be contiguous" if strided else None
