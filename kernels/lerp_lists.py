"""lerp_lists on Triton: theta_t = a_t + w (b_t - a_t), both found in a table of addresses."""

from __future__ import annotations

import dataclasses

import torch

from ._launch import REGISTERS, Config, Launch, config, run, tl, triton
from ._lists import TYPES, all_addresses, load_from
from ._rounding import NARROW, encode_randomly, random_words
from ._segments import find_segment, search_steps

__all__ = ["chunk", "lerp_lists"]


@triton.jit
def _lerp_chunk(
    weight_ptr, addresses_ptr, out, at, row, seed, step, mask,
    TYPE: tl.constexpr, RANDOM: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Elements ``at`` of one position; RANDOM names the type that is rounded to, or is ""."""
    ACC: tl.constexpr = weight_ptr.dtype.element_ty
    w = tl.load(weight_ptr)
    a = load_from(tl.load(addresses_ptr), at, mask, None, TYPE, UNIT).to(ACC)
    b = load_from(tl.load(addresses_ptr + 1), at, mask, None, TYPE, UNIT).to(ACC)
    near = (w < 0.5) & (w > -0.5)
    value = tl.where(near, a, b) + tl.where(near, w, w - 1.0) * (b - a)
    if RANDOM == "":
        theta = out.to(tl.pointer_type(TYPE))
        stored = value.to(TYPE)
    else:
        theta = out.to(tl.pointer_type(tl.int16))
        stored = encode_randomly(value, random_words(seed, at, row, step), RANDOM).to(tl.int16)
    if UNIT > 1:
        theta = tl.multiple_of(theta, UNIT)
    tl.store(theta + at, stored, mask=mask)


@triton.jit(do_not_specialize=["T", "base", "seed", "step"])
def lerp_lists_kernel(
    weight_ptr, table_ptr, outputs_ptr, T: tl.int64, base: tl.int64, seed: tl.int64,
    step: tl.int64, STEPS: tl.constexpr, TYPE: tl.constexpr, RANDOM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """theta_t = a_t + w (b_t - a_t), from |w| >= 1/2 on b_t + (w - 1) (b_t - a_t): one chunk.

    weight (1,), fp32 (fp64 for fp64 tensors); table (see _lists.py) of two lists of contiguous
    tensors of TYPE, chunks of BLOCK; outputs (T,) int64: addresses, from ``base`` on, of contiguous
    tensors of TYPE, which may be those of the first list: an element is read where it is written.
    In weight's type: subtract, multiply, add; one rounding at the end.
    Moves 3 * itemsize(TYPE) bytes per element, in 16-byte accesses where a chunk is whole and all
    its addresses are multiples of 16.
    """
    c = tl.program_id(0).to(tl.int64)
    # The interpreter gives an annotated argument the smallest type that holds it.
    tensors, seed, step = T.to(tl.int64), seed.to(tl.int64), step.to(tl.int64)
    t = find_segment(table_ptr, c, tensors, STEPS, 0)
    length = tl.load(table_ptr + tensors + 1 + t)
    row = tl.load(table_ptr + 2 * tensors + 1 + t)
    addresses_ptr = table_ptr + 3 * tensors + 1 + t * 2
    out = tl.load(outputs_ptr + t) + base.to(tl.int64)
    start = (c - tl.load(table_ptr + t)) * BLOCK
    at = start + tl.arange(0, BLOCK)
    # Addresses are aligned where a chunk begins if they are where the tensor does.
    aligned = ((all_addresses(addresses_ptr, 2) | out) & 15) == 0
    if (start + BLOCK <= length) & aligned:
        _lerp_chunk(weight_ptr, addresses_ptr, out, at, row, seed, step, None, TYPE, RANDOM, 16)
    else:
        _lerp_chunk(
            weight_ptr, addresses_ptr, out, at, row, seed, step, at < length, TYPE, RANDOM, 1
        )


def chunk(dtype: torch.dtype, experts: int) -> int:
    """The elements of a chunk, for which tables are made."""
    return config("lerp_lists", dtype, experts, 1).block


def lerp_lists(
    weight: torch.Tensor,
    table: torch.Tensor,
    outputs: torch.Tensor,
    base: int,
    chunk: int,
    chunks: int,
    dtype: torch.dtype,
    rounding_seed: int | None,
    step: int,
) -> None:
    """The native twin's arguments, with :func:`chunk`; see neulig_fast/ops/_lerp.py."""
    launch = dataclasses.replace(config("lerp_lists", dtype, 2, 1), block=chunk)
    run(weight, launches(weight, table, outputs, base, chunks, dtype, rounding_seed, step, launch))


def launches(
    weight: torch.Tensor,
    table: torch.Tensor,
    outputs: torch.Tensor,
    base: int,
    chunks: int,
    dtype: torch.dtype,
    rounding_seed: int | None,
    step: int,
    launch: Config,
) -> list[Launch]:
    """What :func:`lerp_lists` launches for this call."""
    T = outputs.numel()
    options = {
        "STEPS": search_steps(T),
        "TYPE": TYPES[dtype],
        "RANDOM": NARROW.get(dtype, "") if rounding_seed is not None else "",
        "BLOCK": launch.block,
        "num_warps": launch.num_warps,
        "maxnreg": REGISTERS,
        "enable_fp_fusion": False,  # multiply, then add
    }
    arguments = (weight, table, outputs, T, base, rounding_seed or 0, step)
    return [Launch(lerp_lists_kernel, chunks, arguments, options)]
