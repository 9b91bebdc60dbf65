"""blend_lists on Triton: theta_t = sum_i w[t, i] * x[i, t], x found in a table of addresses."""

from __future__ import annotations

import dataclasses

import torch

from ._launch import REGISTERS, Config, Launch, config, run, tl, triton
from ._lists import TYPES, all_addresses, load_from, why_not
from ._segments import find_segment, search_steps

__all__ = ["blend_lists", "chunk", "why_not"]


@triton.jit
def _load_some(
    addresses_ptr, first, at, mask, COUNT: tl.constexpr, TYPE: tl.constexpr, UNIT: tl.constexpr
):
    """Elements ``at`` of COUNT tensors from number ``first`` on: every load before any use."""
    values = (load_from(tl.load(addresses_ptr + first), at, mask, None, TYPE, UNIT),)
    for j in tl.static_range(1, COUNT):
        values += (load_from(tl.load(addresses_ptr + first + j), at, mask, None, TYPE, UNIT),)
    return values


@triton.jit
def _blend_chunk(
    weights_ptr, addresses_ptr, out, at, mask,
    N: tl.constexpr, HELD: tl.constexpr, TYPE: tl.constexpr, OUT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """w[0] * x[0] + w[1] * x[1] + ..., in order: HELD experts at once, the others by eights."""
    ACC: tl.constexpr = weights_ptr.dtype.element_ty
    held = _load_some(addresses_ptr, 0, at, mask, HELD, TYPE, UNIT)
    acc = tl.load(weights_ptr) * held[0].to(ACC)
    for j in tl.static_range(1, HELD):
        acc = acc + tl.load(weights_ptr + j) * held[j].to(ACC)
    for first in range(HELD, N, 8):
        more = _load_some(addresses_ptr, first, at, mask, 8, TYPE, UNIT)
        for j in tl.static_range(8):
            acc = acc + tl.load(weights_ptr + first + j) * more[j].to(ACC)
    if tl.float64 != OUT:
        acc = acc.to(tl.float32)  # fp64 becomes a 2-byte type by way of fp32, as torch rounds
    theta = out.to(tl.pointer_type(OUT))
    if UNIT > 1:
        theta = tl.multiple_of(theta, UNIT)
    tl.store(theta + at, acc.to(OUT), mask=mask)


@triton.jit(do_not_specialize=["T", "base", "weight_stride"])
def blend_lists_kernel(
    weights_ptr, table_ptr, outputs_ptr, T: tl.int64, base: tl.int64, weight_stride: tl.int64,
    N: tl.constexpr, HELD: tl.constexpr, STEPS: tl.constexpr, TYPE: tl.constexpr,
    OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """theta_t = sum_i weights[row_t, i] * x[i, t] over one chunk of BLOCK elements of a tensor.

    weights (N,) or (R, N) contiguous, fp32 (fp64 for fp64 tensors), weight_stride 0 or N; table
    (see _lists.py) of contiguous tensors of TYPE, chunks of BLOCK; outputs (T,) int64: addresses,
    from ``base`` on, of contiguous tensors of OUT. Types are fp32, bf16, fp16 or fp64.
    Accumulates in weights' type: multiply, then add, in expert order; one rounding at the end.
    Moves N * itemsize(TYPE) + itemsize(OUT) bytes per element: each expert is read once. In
    16-byte accesses where a chunk is whole and all its addresses are multiples of 16.
    """
    c = tl.program_id(0).to(tl.int64)
    # The interpreter gives an annotated argument the smallest type that holds it.
    tensors = T.to(tl.int64)
    t = find_segment(table_ptr, c, tensors, STEPS, 0)
    length = tl.load(table_ptr + tensors + 1 + t)
    row = tl.load(table_ptr + 2 * tensors + 1 + t)
    addresses_ptr = table_ptr + 3 * tensors + 1 + t * N
    out = tl.load(outputs_ptr + t) + base.to(tl.int64)
    w = weights_ptr + row * weight_stride.to(tl.int64)
    start = (c - tl.load(table_ptr + t)) * BLOCK
    lanes = tl.arange(0, BLOCK)
    # Addresses are aligned where a chunk begins if they are where the tensor does.
    aligned = ((all_addresses(addresses_ptr, N) | out) & 15) == 0
    if (start + BLOCK <= length) & aligned:
        _blend_chunk(w, addresses_ptr, out, start + lanes, None, N, HELD, TYPE, OUT, 16)
    else:
        mask = lanes < (length - start)
        _blend_chunk(w, addresses_ptr, out, start + lanes, mask, N, HELD, TYPE, OUT, 1)


def chunk(dtype: torch.dtype, experts: int) -> int:
    """The elements of a chunk, for which tables are made."""
    return config("blend_lists", dtype, experts, 1).block


def blend_lists(
    weights: torch.Tensor,
    table: torch.Tensor,
    outputs: torch.Tensor,
    base: int,
    chunk: int,
    chunks: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> None:
    """The native twin's arguments, with :func:`chunk`; see neulig_fast/ops/_lists.py."""
    launch = config("blend_lists", dtype, weights.shape[-1], 1)
    launch = dataclasses.replace(launch, block=chunk)
    run(weights, launches(weights, table, outputs, base, chunks, dtype, out_dtype, launch))


def launches(
    weights: torch.Tensor,
    table: torch.Tensor,
    outputs: torch.Tensor,
    base: int,
    chunks: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    launch: Config,
) -> list[Launch]:
    """What :func:`blend_lists` launches for this call."""
    T, N = outputs.numel(), weights.shape[-1]
    options = {
        "N": N,
        "HELD": launch.held,
        "STEPS": search_steps(T),
        "TYPE": TYPES[dtype],
        "OUT": TYPES[out_dtype],
        "BLOCK": launch.block,
        "num_warps": launch.num_warps,
        "maxnreg": REGISTERS,
        "enable_fp_fusion": False,  # multiply, then add
    }
    arguments = (weights, table, outputs, T, base, N if weights.ndim == 2 else 0)
    return [Launch(blend_lists_kernel, chunks, arguments, options)]
