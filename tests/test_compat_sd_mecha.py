"""sd-mecha: its own results under ``nf.patch``, and methods of ours in its registry and threads."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import neulig_fast as nf
from neulig_fast import testing

NO_SD_MECHA = "sd-mecha is not installed: pip install sd-mecha"
sd_mecha = pytest.importorskip("sd_mecha", reason=NO_SD_MECHA)
ours = importlib.import_module("neulig_fast.compat.sd_mecha")
registry = importlib.import_module("sd_mecha.extensions.merge_methods")
ties = importlib.import_module("sd_mecha.extensions.builtin.merge_methods.ties")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def deltas(*shape: int, models: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(models)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(models)]


def ties_sum(tensors: list[Tensor], **settings: object) -> Tensor:
    return sd_mecha.ties_sum.__wrapped__(*tensors, **settings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vote", [False, True])
@pytest.mark.parametrize("k", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("shape", [(11, 37), (1,), ()], ids=str)
def test_ties_sum(dtype: torch.dtype, vote: bool, k: float, shape: tuple[int, ...]) -> None:
    tensors = deltas(*shape, dtype=dtype)
    if shape == (11, 37):
        tensors[0][0, :5] = tensors[1][0, :5] = 0  # zeros, and signs that cancel
        tensors[1][1] = -tensors[0][1]
        tensors[2][1] = 0
    expected = ties_sum(tensors, k=k, vote_sgn=vote)
    with nf.patch("sd_mecha", "exact") as patch:
        got = ties_sum(tensors, k=k, vote_sgn=vote)
    assert got.dtype == expected.dtype and torch.equal(got, expected)
    assert (patch.stats()[patch.seams[0]].taken == 1) == (dtype != torch.float64)
    truth = ties_sum([tensor.double() for tensor in tensors], k=k, vote_sgn=vote)
    with nf.patch("sd_mecha"):
        testing.assert_within_rule(ties_sum(tensors, k=k, vote_sgn=vote), expected, truth, 3)


def test_ties_sum_by_hand() -> None:
    tensors = [torch.tensor([4.0, -3, 1, 1]), torch.tensor([-2.0, -1, 5, 3])]
    with nf.patch("sd_mecha"):
        # The third smallest, with all that equal it, is the least that is kept: 3 in both... of
        # the first 4 and -3, of the second 5 and 3.
        got = ties_sum(tensors, k=0.25)
    assert got.tolist() == [4, -3, 5, 3]


def test_what_is_not_taken_goes_to_sd_mecha() -> None:
    tensors = deltas(6, 8)
    broken = [tensors[0].clone(), *tensors[1:]]
    broken[0][0, 0] = torch.nan
    cases = {
        "strided tensors": [tensor.t() for tensor in tensors],
        "a gradient": [tensor.clone().requires_grad_() for tensor in tensors],
        "values that are not finite": broken,
    }
    for reason, given in cases.items():
        expected = ties_sum(given, k=0.5)
        with nf.patch("sd_mecha") as patch:
            got = ties_sum(given, k=0.5)
        assert torch.equal(got.nan_to_num(5.0), expected.nan_to_num(5.0))
        assert [*patch.stats()[patch.seams[0]].passed] == [reason]
    with nf.patch("sd_mecha", "exact") as patch:
        ties_sum(deltas(9, models=5), k=0.5)
    assert [*patch.stats()[patch.seams[0]].passed] == [
        "more than 4 models, added up in torch's order"
    ]


def test_filter_top_k_keeps_equal_magnitudes() -> None:
    tensor = torch.tensor([1.0, -2, 2, -0.0, 2, 1, 0.5])
    expected = ties.filter_top_k(tensor, 2 / 7)
    with nf.patch("sd_mecha", "exact") as patch:
        got = ties.filter_top_k(tensor, 2 / 7)
    assert patch.stats()[patch.seams[1]].taken == 1
    assert torch.equal(got, expected) and torch.equal(got.signbit(), expected.signbit())
    assert got.tolist() == [0, -2, 2, 0, 2, 0, 0]


def test_methods_in_a_recipe() -> None:
    a, b, c = ({"x": t, "y": t[0]} for t in deltas(4, 5))
    by_name = registry.resolve
    cases = {
        "nf_weighted_sum": (by_name("nf_weighted_sum")(a, b, alpha=0.25), 0.75, 0.25, 0.0),
        "nf_n_average": (by_name("nf_n_average")(a, b, c), 1 / 3, 1 / 3, 1 / 3),
        "nf_add_difference": (
            by_name("nf_add_difference")(a, sd_mecha.subtract(b, c), alpha=0.5), 1.0, 0.5, -0.5,
        ),
    }  # fmt: skip
    for recipe, *weights in cases.values():
        for threads in (0, 4):
            got = sd_mecha.merge(recipe, output_dtype=torch.float32, threads=threads)
            for key in ("x", "y"):
                wanted = sum(w * m[key].double() for w, m in zip(weights, (a, b, c), strict=True))
                assert torch.allclose(got[key].double(), wanted, atol=1e-6)


def test_ties_and_dare_in_a_recipe() -> None:
    a, b, base = ({"x": t} for t in deltas(300, 200))
    parts = [sd_mecha.subtract(model, base) for model in (a, b)]
    d = torch.stack([a["x"] - base["x"], b["x"] - base["x"]])

    def merged(name: str, **settings: object) -> Tensor:
        recipe = registry.resolve(name)(*parts, **settings)
        recipe = registry.resolve("nf_add_difference")(base, recipe)
        return sd_mecha.merge(recipe, output_dtype=torch.float32)["x"] - base["x"]

    got = merged("nf_ties_sum", k=0.3, vote_sgn=True)
    assert torch.allclose(got, ties_sum([*d], k=0.3, vote_sgn=True), atol=1e-5)
    for name in ("nf_dare_sum", "nf_dare_ties_sum"):
        assert torch.equal(merged(name, seed=1), merged(name, seed=1))
        assert not torch.equal(merged(name, seed=1), merged(name, seed=2))
        whole = merged(name, probability=0.0)
        wanted = d.mean(0) if name == "nf_dare_sum" else ties_sum([*d], k=1.0, vote_sgn=True)
        assert torch.allclose(whole, wanted, atol=1e-5)
        drawn = merged(name, probability=0.75, seed=3)
        # An element that one delta alone has left is 4 times that delta's, or half of both's.
        sums = torch.stack([4 * d[0], 4 * d[1], 2 * d.sum(0), torch.zeros_like(d[0])])
        assert ((drawn - sums).abs().min(0).values < 1e-4).all()
        assert abs(float((drawn.abs() < 1e-6).float().mean()) - 0.75**2) < 0.01
    assert not merged("nf_dare_sum", probability=1.0).any()


def test_four_threads_at_once() -> None:
    tensors = [deltas(64, 301, models=4) for _ in range(8)]
    calls = [
        lambda x: ours.nf_ties_sum(*x, k=0.3),
        lambda x: ours.nf_dare_ties_sum(*x, seed=4, key="k"),
        lambda x: ours.nf_n_average(*x),
    ]
    jobs = [(call, x) for x in tensors for call in calls]
    expected = [call(x) for call, x in jobs]
    with ThreadPoolExecutor(4) as pool:
        got = [*pool.map(lambda job: job[0](job[1]), jobs * 3)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected * 3, strict=True))


@pytest.mark.parametrize("name", ["weighted", "average", "difference", "ties", "dare", "dare_ties"])
def test_negated_views_are_what_they_are(name: str) -> None:
    call: Callable[[Tensor, Tensor], Tensor] = {
        "weighted": ours.nf_weighted_sum,
        "average": ours.nf_n_average,
        "difference": ours.nf_add_difference,
        "ties": ours.nf_ties_sum,
        "dare": lambda *x: ours.nf_dare_sum(*x, key="k"),
        "dare_ties": lambda *x: ours.nf_dare_ties_sum(*x, key="k"),
    }[name]
    a, b = deltas(30, 20, models=2)
    view = torch._neg_view(b)
    assert view.is_neg()
    assert torch.equal(call(a, view), call(a, -b))
    assert not torch.equal(call(a, view), call(a, b))


def test_our_ties_takes_what_the_seam_leaves_to_sd_mecha() -> None:
    kept = ours.nf_ties_sum(torch.tensor([torch.nan, 1.0, -2]), torch.tensor([3.0, 1, 1]), k=0.7)
    assert kept[0].isnan() and kept[1] == 1
    assert ours.nf_ties_sum(torch.zeros(0, 3, dtype=torch.bfloat16)).shape == (0, 3)
    with pytest.raises(ValueError, match="k must be from 0 to 1, got 2"):
        ours.nf_ties_sum(torch.ones(3), k=2)
