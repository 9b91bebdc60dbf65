"""Merges of peft and sd-mecha on any tensors at all, with either parity.

``exact`` has the original's bits, or its error. ``accurate`` is no further from the original's own
arithmetic in fp64, where no two magnitudes are equal: between those the originals leave the choice
to a sort. NaN is where the original has it; an infinity that is dropped or outvoted may be gone.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from neulig_fast import testing
from neulig_fast.compat._seam import Place, Replacement

from .test_compat_fuzz import (
    ORDINARY,
    SHAPES,
    fuzzed,
    ordinary,
    outcome,
    same,
    seam_of,
    stacks,
    taken,
)

PEFT = "peft.utils.merge_utils"
TIES = "sd_mecha.extensions.builtin.merge_methods.ties"
MERGES = ("task_arithmetic", "magnitude_prune", "ties")
DENSITIES = st.sampled_from([0.0, 1e-9, 0.2, 0.5, 0.97, 1.0, -0.5, 2.0])
LONG = st.lists(st.integers(5, 20), min_size=1, max_size=1)
often = settings(fuzzed, max_examples=120)
NUMBERS = st.lists(st.sampled_from([0.0, 0.5, -1.5, 1.0]), min_size=5, max_size=5)
FLOATS = st.sampled_from(testing.DTYPES)
SPECIAL = st.sampled_from(["", "nan", "inf", "both"])


@pytest.fixture(autouse=True, scope="module")
def everything_is_large() -> Iterator[None]:
    """What peft's weighted sums are left to the original below."""
    compat = importlib.import_module("neulig_fast.compat.peft")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(compat, "SMALL", 0)
        warnings.filterwarnings("ignore", message="The density")
        yield


def needs(name: str) -> pytest.MarkDecorator:
    there = any(metadata.distributions(name=name))
    return pytest.mark.skipif(not there, reason=f"{name} is not installed")


def seen(tensor: Tensor, how: str) -> Tensor:
    """The same numbers, by way of a view that few expect."""
    if how == "negated":
        return torch._neg_view(-tensor)
    if how == "conjugate" and tensor.dtype == torch.float32:
        return torch.complex(tensor, -tensor).conj()
    if how == "transposed" and tensor.ndim > 1:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    return tensor


VIEWS = st.sampled_from(["plain", "plain", "negated", "conjugate", "transposed"])


BROKEN = torch.tensor([[1, torch.nan, -2, 3.5], [2, 1, -3, -0.5]])


@st.composite
def distinct(draw: st.DrawFn, shapes: st.SearchStrategy[list[int]] = SHAPES | LONG) -> Tensor:
    """Models' tensors as rows, (N, ...): zeros of both signs, and no magnitude twice in a row that
    is another number; halves, whose sums are exact. Some may be NaN or infinite."""
    shape, count = draw(shapes), draw(st.integers(1, 5))
    n = torch.Size(shape).numel()
    rows = []
    for _ in range(count):
        magnitudes = draw(st.permutations([*range(1, n + 1)]))
        signs = draw(st.lists(st.sampled_from([1, -1, 1, -1, 0.0, -0.0]), min_size=n, max_size=n))
        rows += [m / 2 * s for m, s in zip(magnitudes, signs, strict=True)]
    tensor = torch.tensor(rows, dtype=torch.float64)
    special = draw(SPECIAL)
    for value in {"nan": [torch.nan], "inf": [torch.inf], "both": [torch.nan, -torch.inf]}.get(
        special, []
    ):
        if tensor.numel():
            tensor[draw(st.integers(0, tensor.numel() - 1))] = value
    return tensor.to(draw(FLOATS)).reshape(count, *shape)


def widened(given: Any) -> Any:
    """Arguments with all tensors of floats in fp64."""
    if isinstance(given, Tensor):
        wide = torch.complex128 if given.is_complex() else torch.float64
        return given.to(wide) if given.is_floating_point() or given.is_complex() else given
    if isinstance(given, (list, tuple)):
        return type(given)(map(widened, given))
    if hasattr(given, "entries"):  # mergekit's group of tensors
        entries = (replace(entry, tensor=widened(entry.tensor)) for entry in given.entries)
        return replace(given, entries=tuple(entries))
    return given


def worst_of(x: Tensor, truth: Tensor) -> float:
    """The largest magnitude, where the truth is finite."""
    return max([0.0, *x.double().abs()[truth.isfinite()].tolist()])


def compared(host: str, where: str, *args: Any, terms: int, infinite: bool, **named: Any) -> bool:
    """Ours in ``accurate`` parity against the original in fp64, or where the original gets the call
    against itself. ``infinite``: whether its NaN may be of an infinity that ours dropped."""
    original, fast = Place(where).get(), seam_of(host, where).accurate
    assert fast is not None
    ours = Replacement(where, original, fast)
    got, theirs = (outcome(f, *args, **named) for f in (ours.function, original))
    if not ours.counts().taken:
        assert same(got, theirs)
        return False
    truth = outcome(original, *widened(args), **named).double()
    assert (got.dtype, got.shape) == (theirs.dtype, theirs.shape)
    # Not where the original fails in this type alone, as where 1e-8 is 0 in fp16.
    known = theirs.isfinite() | ~truth.isfinite()
    if infinite:
        known &= ~theirs.isnan()
    got, theirs, truth = (x.where(known, 0) for x in (got, theirs, truth))
    testing.assert_within_rule(got, theirs, truth, terms=terms)
    worst = [worst_of(x - truth, truth) for x in (got, theirs)]
    assert worst[0] <= max(worst[1], torch.finfo(got.dtype).eps * worst_of(truth, truth))
    return True


# -- peft ------------------------------------------------------------------------------------------


def arguments(name: str, density: float, method: str) -> tuple[Any, ...]:
    more: dict[str, tuple[Any, ...]] = {"ties": (density, method), "task_arithmetic": ()}
    return more.get(name, (density,))


@fuzzed
@given(stacks() | distinct(), NUMBERS, DENSITIES, st.sampled_from(["total", "frequency"]), VIEWS)
@example(ORDINARY, [0.5, -1.5, 1.0, 0, 0], 0.5, "total", "plain")
@example(-torch.zeros(2, 3), [0.5, 1.0, 0, 0, 0], 0.5, "total", "plain")
@needs("peft")
def test_peft_to_the_bit(
    rows: Tensor, numbers: list[float], density: float, method: str, view: str
) -> None:
    tensors, weights = [seen(row, view) for row in rows], torch.tensor(numbers[: len(rows)])
    left = not ordinary(rows) or view != "plain" or not 0 <= density < 1 or len(rows) > 4
    left |= bool(rows.abs().reshape(len(rows), -1).sort()[0].diff().eq(0).any())  # ties
    for name in MERGES:
        args = (tensors, weights, *arguments(name, density, method))
        assert taken("peft", f"{PEFT}:{name}", *args) or left
    assert taken("peft", f"{PEFT}:magnitude_based_pruning", tensors[0], density) or left


@often
@given(distinct(), NUMBERS, DENSITIES, st.sampled_from(["total", "frequency"]), VIEWS)
@example(BROKEN, [0.5, -1.5, 1.0, 0, 0], 0.5, "total", "plain")
@needs("peft")
def test_peft_is_no_further_from_the_truth(
    rows: Tensor, numbers: list[float], density: float, method: str, view: str
) -> None:
    tensors, weights = [seen(row, view) for row in rows], torch.tensor(numbers[: len(rows)])
    left = not ordinary(rows) or view not in ("plain", "transposed") or not 0 <= density < 1
    for name in MERGES:
        more = arguments(name, density, method)
        broken = bool(rows.isinf().any())
        took = compared(
            "peft", f"{PEFT}:{name}", tensors, weights, *more, terms=len(rows), infinite=broken
        )  # fmt: skip
        assert took or left


# -- sd-mecha --------------------------------------------------------------------------------------

SHARES = st.sampled_from([0.0, 1e-9, 0.2, 0.5, 0.97, 1.0, -0.5, 2.0])


@often
@given(stacks() | distinct(), SHARES, st.booleans(), VIEWS)
@example(ORDINARY, 0.5, True, "plain")
@example(torch.tensor([1.0, -2.0, 0.5]), 0.5, False, "plain")
@needs("sd_mecha")
def test_sd_mecha_to_the_bit(rows: Tensor, k: float, vote: bool, view: str) -> None:
    tensors = [seen(row, view) for row in rows]
    left = not ordinary(rows) or view != "plain" or len(rows) > 4 or not 0 <= k <= 1
    assert taken("sd_mecha", f"{TIES}:ties_sum.__wrapped__", *tensors, k=k, vote_sgn=vote) or left
    assert taken("sd_mecha", f"{TIES}:filter_top_k", tensors[0], k) or left


@often
@given(distinct(), SHARES, st.booleans(), VIEWS)
@example(BROKEN, 0.5, True, "plain")
@needs("sd_mecha")
def test_sd_mecha_is_no_further_from_the_truth(
    rows: Tensor, k: float, vote: bool, view: str
) -> None:
    where = f"{TIES}:ties_sum.__wrapped__"
    tensors = [seen(row, view) for row in rows]
    left = not ordinary(rows) or view != "plain" or not 0 <= k <= 1
    more = {"k": k, "vote_sgn": vote, "terms": len(rows), "infinite": False}
    assert compared("sd_mecha", where, *tensors, **more) or left
