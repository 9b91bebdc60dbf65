"""``exact`` on any tensors at all: FusionBench's and mergekit's own bits, or their own errors.

Values tie, cancel and are not finite, zeros have both signs, shapes are empty, of one element or of
no dimension, and memory is strided. Ours must take the calls that have none of this.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from neulig_fast.compat import _patch
from neulig_fast.compat._seam import Place, Replacement, Seam

VALUES = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, 3.3, -3.3, 1e-30, 6e4, torch.nan, torch.inf]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
SHARES = st.sampled_from([0, 0.2, 20, 0.5, 1.0, 1 / 3])
fuzzed = settings(max_examples=60, deadline=None, derandomize=True, database=None)


TIES = "fusion_bench.method.ties_merging.ties_merging_utils"
SUMS = "fusion_bench.utils.state_dict_arithmetic"
ORDINARY = torch.tensor([[1, -2, 3.3], [-0.5, 2, -1], [0.5, 1, 2]])  # of three models

SHAPES = st.lists(st.integers(0, 5), max_size=3)
VECTORS = st.lists(st.integers(0, 5), min_size=1, max_size=1)
MATRICES = st.lists(st.integers(0, 5), min_size=2, max_size=2)
SQUARES = st.integers(0, 5).map(lambda n: [n, n])


@st.composite
def stacks(draw: st.DrawFn, shapes: st.SearchStrategy[list[int]] = SHAPES) -> Tensor:
    """Models' tensors as rows, (N, ...)."""
    shape = draw(shapes)
    count = draw(st.integers(1, 5))
    n = count * torch.Size(shape).numel()
    finite = VALUES[:-2] if draw(st.booleans()) else VALUES
    values = draw(st.lists(st.sampled_from(finite), min_size=n, max_size=n))
    found = torch.tensor(values, dtype=torch.float64).nan_to_num(nan=torch.nan, posinf=torch.inf)
    dtype = draw(st.sampled_from(DTYPES))
    tensor = (found if dtype.is_floating_point else found.nan_to_num(1, 1)).to(dtype)
    tensor = tensor.reshape(count, *shape)
    if draw(st.booleans()):  # every other element of memory that is twice as long
        tensor = torch.stack([tensor, tensor], -1)[..., 0]
    return tensor


@st.composite
def balanced(draw: st.DrawFn) -> Tensor:
    """Rows of -1, 0 and 1 in which as many are positive as negative, and columns that cancel: no
    sign has a majority anywhere, which is where rules of zero signs decide."""
    count, width = draw(st.sampled_from([2, 4])), draw(st.integers(1, 6))
    rows = [draw(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=width, max_size=width))]
    rows += [draw(st.permutations(rows[0])) for _ in range(count // 2 - 1)]
    half = torch.tensor(rows, dtype=draw(st.sampled_from((torch.float32, torch.bfloat16))))
    return torch.cat([half, -half])[torch.tensor(draw(st.permutations(range(count))))]


def ordinary(rows: Tensor) -> bool:
    """What no replacement has a reason to leave to its original."""
    small = 2 <= len(rows) <= 4 and rows.numel() > len(rows)
    finite = rows.dtype == torch.float32 and bool(rows.isfinite().all())
    return small and finite and rows.is_contiguous()


def outcome(function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return function(*args, **named)
        except (RuntimeError, TypeError, ValueError, AssertionError, LookupError) as error:
            return type(error)


def same(a: Any, b: Any, signs: bool = True) -> bool:
    """The same bits, but that any NaN is one; or the same error. ``signs``: of zeros, too."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        if a.is_complex():
            return same(*(torch.view_as_real(x.resolve_conj()) for x in (a, b)), signs)
        if not a.is_floating_point():
            return torch.equal(a, b)
        alike = torch.equal(a.signbit() | a.isnan(), b.signbit() | b.isnan())
        return (alike or not signs) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k], signs) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, signs) for x, y in zip(a, b, strict=True))
    return bool(a == b)


@functools.cache
def seam_of(host: str, where: str) -> Seam:
    """What is replaced there."""
    compat = importlib.import_module(_patch.HOSTS[host])
    (seam,) = (seam for seam in compat.HOST.seams() if seam.where == where)
    return seam


def taken(host: str, where: str, *args: Any, **named: Any) -> bool:
    """Ours against the original; whether it was ours that took the call."""
    original, fast = Place(where).get(), seam_of(host, where).exact
    assert fast is not None
    expected = outcome(original, *args, **named)
    replacement = Replacement(where, original, fast)
    signs = not where.startswith(SUMS)  # a sum of nothing but negative zeros is 0 there, -0 here
    assert same(outcome(replacement.function, *args, **named), expected, signs)
    return replacement.counts().taken == 1


@pytest.fixture
def fusion_bench() -> None:
    pytest.importorskip("fusion_bench", reason="FusionBench is not installed")


@pytest.fixture
def mergekit() -> None:
    pytest.importorskip("mergekit", reason="mergekit is not installed")


@pytest.fixture
def sd_mecha() -> None:
    pytest.importorskip("sd_mecha", reason="sd-mecha is not installed")


@fuzzed
@given(stacks(VECTORS) | balanced(), SHARES, st.sampled_from(["sum", "mean", "max"]))
@example(ORDINARY, 0.5, "mean")
@pytest.mark.usefixtures("fusion_bench")
def test_ties(rows: Tensor, share: float, how: str) -> None:
    width = rows.shape[1]
    left = not ordinary(rows) or int(width * (share / 100 if share > 1 else share)) + 1 >= width
    assert taken("fusion_bench", f"{TIES}:ties_merging", rows, share, how) or left
    assert taken("fusion_bench", f"{TIES}:topk_values_mask", rows, share, True) or left


@fuzzed
@given(balanced(), st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
@example(ORDINARY, 0.5, True)
@pytest.mark.usefixtures("sd_mecha")
def test_ties_of_sd_mecha(rows: Tensor, k: float, vote: bool) -> None:
    where = "sd_mecha.extensions.builtin.merge_methods.ties:ties_sum.__wrapped__"
    assert taken("sd_mecha", where, *rows, k=k, vote_sgn=vote) or not ordinary(rows)


@fuzzed
@given(stacks(), st.lists(st.sampled_from([0, 0.5, -1.5, 1]), min_size=5, max_size=5))
@example(ORDINARY, [0.5, -1.5, 1])
@pytest.mark.usefixtures("fusion_bench")
def test_state_dicts(rows: Tensor, weights: list[float]) -> None:
    states, weights = [{"a": row, "b": row.clone()} for row in rows], weights[: len(rows)]
    left = not ordinary(rows)
    assert taken("fusion_bench", f"{SUMS}:state_dict_sum", states) or left
    assert taken("fusion_bench", f"{SUMS}:state_dict_avg", states) or left
    assert taken("fusion_bench", f"{SUMS}:state_dict_interpolation", states, weights) or left
    none = left or not any(weights)
    assert taken("fusion_bench", f"{SUMS}:state_dict_weighted_sum", states, weights) or none
    assert taken("fusion_bench", f"{TIES}:state_dict_to_vector", states[0]) or left


@fuzzed
@given(stacks(SQUARES) | stacks(MATRICES), st.sampled_from([1.0, 0.9, 0, 1 / 3]))
@example(ORDINARY.expand(2, 3, 3).contiguous(), 0.9)
@pytest.mark.usefixtures("fusion_bench")
def test_regmean(rows: Tensor, ratio: float) -> None:
    where = "fusion_bench.method.regmean.regmean:reduce_non_diagonal_elements"
    left = not ordinary(rows) or rows.shape[1] != rows.shape[2]
    assert taken("fusion_bench", where, rows[0], ratio) or left


@fuzzed
@given(stacks(), st.sampled_from([0.0, 0.5, -1.0, 1e9]))
@example(ORDINARY, 0.5)
@pytest.mark.usefixtures("mergekit")
def test_elements_of_mergekit(rows: Tensor, number: float) -> None:
    group = importlib.import_module("mergekit.merge_methods").TensorGroup
    where, left = "mergekit.merge_methods", not ordinary(rows)
    tensors = group.from_tensors([*rows], base_index=0)
    assert taken("mergekit", f"{where}.ram:ram_merge.implementation", tensors, abs(number)) or left
    pair = group.from_tensors([rows[0], rows[-1]], base_index=0)
    assert (
        taken("mergekit", f"{where}.nearswap:nearswap_merge.implementation", pair, number) or left
    )
