"""Tables of the addresses of N lists of T tensors, as kernels read them.

A table is ``bounds (T + 1) | lengths (T) | rows (T) | addresses (T, N)``, int64; see
neulig_fast/tensor_lists.py. Chunk c of BLOCK elements belongs to the last tensor t with
bounds[t] <= c, which :func:`neulig_fast.kernels._segments.find_segment` finds.
"""

from __future__ import annotations

import torch

from ._launch import MAX_EXPERTS, missing, tl, triton

TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


@triton.jit
def all_addresses(addresses_ptr, N: tl.constexpr):
    """The bits that any of N addresses has set: its low bits tell how all are aligned."""
    bits = tl.load(addresses_ptr)
    for i in range(1, N):
        bits |= tl.load(addresses_ptr + i)
    return bits


@triton.jit
def load_from(address, at, mask, other, TYPE: tl.constexpr, UNIT: tl.constexpr):
    """Elements ``at`` of the tensor at ``address`` (int64), which is a multiple of UNIT bytes."""
    x = address.to(tl.pointer_type(TYPE))
    if UNIT > 1:
        x = tl.multiple_of(x, UNIT)
    return tl.load(x + at, mask=mask, other=other)


def why_not(weights: torch.Tensor, *_args: object) -> str | None:
    """Why Triton cannot take a call, or None."""
    if (reason := missing(weights.device.type)) is not None:
        return reason
    experts = weights.shape[-1]
    return f"{experts} experts, more than {MAX_EXPERTS}" if experts > MAX_EXPERTS else None
