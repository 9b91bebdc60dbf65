"""FusionBench's functions against what replaces them: to the bit, or against an fp64 oracle."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import os
import sys
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

import neulig_fast as nf
from neulig_fast import testing
from neulig_fast.compat._seam import Place, Replacement
from neulig_fast.compat.fusion_bench import HOST

pytest.importorskip("fusion_bench", reason="FusionBench is not installed")
METHOD = "fusion_bench.method"
TIES = f"{METHOD}.ties_merging.ties_merging_utils"
WRAPPERS = "fusion_bench.models.wrappers"
STATES = "fusion_bench.utils.state_dict_arithmetic"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def imported() -> Iterator[None]:
    """FusionBench, without our source tree in the path: transformers would take kernels/ for a
    project of that name."""
    before = list(sys.path)
    sys.path = [path for path in before if not os.path.exists(path + "/kernels/_launch.py")]
    for seam in HOST.seams():
        importlib.import_module(seam.where.split(":")[0])
    yield
    sys.path = before


def pair(where: str, parity: str) -> tuple[Callable[..., Any], Replacement]:
    """A function of FusionBench, and its replacement in front of it."""
    (seam,) = (seam for seam in HOST.seams() if seam.where == where)
    original, fast = Place(where).get(), seam.replacement(parity)
    assert fast is not None
    return original, Replacement(where, original, fast)


def result(function: Callable[..., Any], *args: Any) -> Any:
    """What it returns, or the error that it raises; what it prints is swallowed."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return function(*args)
        except (RuntimeError, TypeError, ValueError, AssertionError, LookupError) as error:
            return repr(error)


def same(a: Any, b: Any) -> bool:
    """The same bits, names and types, NaN's bits apart."""
    if isinstance(a, Tensor):
        if type(a) is not type(b) or a.dtype != b.dtype or a.shape != b.shape:
            return False
        if not a.is_floating_point():
            return torch.equal(a, b)
        signs = torch.equal(a.signbit() | a.isnan(), b.signbit() | b.isnan())
        return signs and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def taken(replacement: Replacement) -> int:
    return replacement.counts().taken


# -- AdaMerging -----------------------------------------------------------------------------------


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 7), nn.LayerNorm(7), nn.BatchNorm1d(7), nn.Linear(7, 3, bias=False)
    ).to(dtype)


def merged_model(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A merged model of three task vectors whose weights want clamping."""
    torch.manual_seed(0)
    base, experts = network(dtype), [network(dtype) for _ in range(3)]
    tensors = len(list(base.parameters()))
    weights = torch.randn((3, tensors) if kind == "layer" else (3,))
    if kind == "layer":
        module = importlib.import_module(f"{WRAPPERS}.layer_wise_fusion")
        return module.LayerWiseMergedModel(weights, base, experts, **options)
    module = importlib.import_module(f"{WRAPPERS}.task_wise_fusion")
    return module.TaskWiseMergedModel(weights, base, experts, **options)


WHERE = {
    "layer": f"{WRAPPERS}.layer_wise_fusion:LayerWiseMergedModel.merge_weights",
    "task": f"{WRAPPERS}.task_wise_fusion:TaskWiseMergedModel.merge_weights",
}


def gradient(function: Callable[..., Any], model: Any, *args: Any) -> Tensor:
    """Of a loss that not all tensors have a part in."""
    model.merge_weight.grad = None
    state = function(model, *args)
    names = [name for name, _ in model.pretrained_model.named_parameters()][:-1]
    loss = torch.stack(
        [(state[name].double().sin() * (i + 1)).sum() for i, name in enumerate(names)]
    )
    loss.sum().backward()
    return model.merge_weight.grad.clone()


@pytest.mark.parametrize("parity", ["exact", "accurate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["layer", "task"])
def test_merged_models_have_the_originals_bits(kind: str, dtype: torch.dtype, parity: str) -> None:
    original, fast = pair(WHERE[kind], parity)
    for clamp in (True, False):
        softmax = {"normalized_merging_weights": clamp} if kind == "layer" else {}
        model = merged_model(kind, dtype, clamp_weights=clamp, **softmax)
        with torch.no_grad():
            expected = original(model)
            got = fast.function(model)
        assert same(got, expected) and model._merged_state_dict is got
        assert got["2.running_mean"] is model.pretrained_model[2].running_mean  # as it was
        model.merge_and_unload()
        assert torch.equal(model.pretrained_model[0].weight, expected["0.weight"])
    assert fast.counts() == (2, {})


def test_gradients_to_the_bit_per_layer_and_within_the_rule_per_model() -> None:
    original, exact = pair(WHERE["layer"], "exact")
    model = merged_model("layer", clamp_weights=False)
    assert same(gradient(exact.function, model), gradient(original, model))
    assert taken(exact) == 1
    for kind in WHERE:
        original, fast = pair(WHERE[kind], "accurate")
        oracle = gradient(original, merged_model(kind, torch.float64))
        found = gradient(fast.function, merged_model(kind))
        working = gradient(original, merged_model(kind))
        testing.assert_within_rule(found, working, oracle.double(), terms=60)
    model = merged_model("task")
    original, exact = pair(WHERE["task"], "exact")
    assert same(gradient(exact.function, model), gradient(original, model))
    assert exact.counts() == (0, {"a gradient, which the original adds up in its graph's order": 1})


def test_bf16_is_rounded_once() -> None:
    original, fast = pair(WHERE["layer"], "accurate")
    model = merged_model("layer", torch.bfloat16)
    with torch.no_grad():
        got, working = fast.function(model), original(model)
    weights = model.merge_weight.detach().clamp(0, 1).double()
    for t, (name, base) in enumerate(model.pretrained_model.named_parameters()):
        vectors = [dict(v.named_parameters())[name].double() for v in model.task_vectors]
        exact = base.double() + sum(w[t] * v for w, v in zip(weights, vectors, strict=True))
        once = (got[name].double() - exact).abs().max()
        assert once <= (working[name].double() - exact).abs().max()
        assert once <= 2**-8 * exact.abs().max()
    _, exact_twin = pair(WHERE["layer"], "exact")
    exact_twin.function(model)
    reason = "16-bit tensors, which the original rounds at every step"
    assert exact_twin.counts() == (0, {reason: 1})


def test_what_merged_models_leave_to_the_original() -> None:
    original, fast = pair(WHERE["layer"], "accurate")
    model = merged_model("layer")
    mask = {k: torch.rand_like(p) > 0.5 for k, p in model.pretrained_model.named_parameters()}
    assert same(fast.function(model, mask), original(model, mask))
    sparse = merged_model("layer", sparsity_ratio=0.5)
    sparse_result = result(fast.function, sparse)
    assert same(sparse_result, result(original, sparse))
    short = merged_model("layer")
    short.merge_weight.data = short.merge_weight.data[:, 1:]
    assert result(fast.function, short) == result(original, short)
    reasons = dict(fast.counts().passed)
    assert fast.counts().taken == 0 and reasons.pop("a task_vector_mask") == 1
    assert "sparse tensors" in reasons


# -- WE-MoE ---------------------------------------------------------------------------------------

EXPERTS = "fusion_bench.models.we_moe:WeightEnsemblingMoE"


def experts_module(batch_first: bool, body: Callable[[], nn.Module], **options: Any) -> Any:
    torch.manual_seed(1)
    module = importlib.import_module("fusion_bench.models.we_moe").WeightEnsemblingMoE
    return module(6, body(), [body() for _ in range(3)], batch_first=batch_first, **options)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6, bias=False))


@pytest.mark.parametrize("batch_first", [True, False])
def test_experts_of_a_batch_in_one_pass(batch_first: bool) -> None:
    original, fast = pair(f"{EXPERTS}.forward", "accurate")

    def run(function: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        model = experts_module(batch_first, mlp).to(dtype)
        x = torch.randn(4, 5, 6, dtype=torch.float64).to(dtype).requires_grad_()
        y = function(model, x)
        (y.double() ** 2).sum().backward()
        assert model._merged_state_dict is None
        return [y.detach(), x.grad, *(p.grad for p in model.gate.parameters())]

    oracle = run(original, torch.float64)
    results = zip(
        run(fast.function, torch.float32), run(original, torch.float32), oracle, strict=True
    )
    for got, working, exact in results:
        testing.assert_within_rule(got, working, exact, terms=200)
    assert fast.counts() == (1, {})


def test_merging_for_one_sample_has_the_originals_bits() -> None:
    for parity in ("exact", "accurate"):
        original, fast = pair(f"{EXPERTS}.merge_weights", parity)
        model = experts_module(True, mlp)
        with torch.no_grad():
            weights = torch.randn(3)
            assert same(fast.function(model, weights), original(model, weights))
        assert taken(fast) == 1


def test_experts_of_other_structures_go_to_the_original() -> None:
    original, fast = pair(f"{EXPERTS}.forward", "accurate")
    bodies = {
        "a base model with BatchNorm1d in it": lambda: nn.Sequential(
            nn.Linear(6, 6), nn.BatchNorm1d(5)
        ),
        "dropout": lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)),
    }
    x = torch.randn(4, 5, 6)
    for reason, body in bodies.items():
        model = experts_module(True, body)
        torch.manual_seed(0)
        got = fast.function(model, x)
        torch.manual_seed(0)
        again = experts_module(True, body)
        torch.manual_seed(0)
        assert same(got, original(again, x))
        assert fast.counts().passed[reason] == 1
    reduced = experts_module(True, mlp, batch_reduce=True)
    assert same(fast.function(reduced, x), original(reduced, x))
    hooked = experts_module(True, mlp)
    hooked.base_model[0].register_forward_hook(lambda *_: None)
    assert same(fast.function(hooked, x), original(hooked, x))
    assert fast.counts().passed["hooks"] == 1 and taken(fast) == 0

    def tied() -> nn.Module:
        layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        layers[1].weight = layers[0].weight
        return layers

    shared = experts_module(True, tied)
    assert same(result(fast.function, shared, x), result(original, shared, x))
    assert fast.counts().passed["tied parameters"] == 1 and taken(fast) == 0


# -- RankOne-MoE ----------------------------------------------------------------------------------

RANK_ONE = "fusion_bench.models.rankone_moe:RankOneMoE"


def two_layers(between: nn.Module | None = None) -> nn.Module:
    """With the names that RankOne-MoE knows."""
    layers = {"fc1": nn.Linear(6, 9), "between": between or nn.GELU(), "fc2": nn.Linear(9, 6)}
    return nn.Sequential(OrderedDict(layers))


def rank_one(batch_first: bool, body: Callable[[], nn.Module], **options: Any) -> Any:
    torch.manual_seed(14)
    kind = importlib.import_module(RANK_ONE.split(":")[0]).RankOneMoE
    options = {"rank_k": 2, "svd_accelerator": None, **options}
    return kind(6, body(), [body() for _ in range(3)], batch_first=batch_first, **options)


@pytest.mark.parametrize("select", [-1, 3])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_ranks_of_a_batch_in_one_pass(batch_first: bool, layers: int, select: int) -> None:
    original, fast = pair(f"{RANK_ONE}.forward", "accurate")

    def run(function: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
        options = {"router_hidden_layers": layers, "select_k": select}
        model = rank_one(batch_first, two_layers, **options).to(dtype)
        generator = torch.Generator().manual_seed(15)
        x = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64).to(dtype)
        y = function(model, x.requires_grad_())
        (y.double() ** 2).sum().backward()
        assert model._merged_state_dict is None
        return [y.detach(), x.grad, *(p.grad for p in model.gate.parameters())]

    oracle, working = run(original, torch.float64), run(original, torch.float32)
    for got, other, exact in zip(run(fast.function, torch.float32), working, oracle, strict=True):
        testing.assert_within_rule(got, other, exact, terms=200)
    assert fast.counts() == (1, {})


def test_ranks_that_go_to_the_original() -> None:
    original, fast = pair(f"{RANK_ONE}.forward", "accurate")
    x = torch.randn(4, 5, 6)
    cases = {
        "one merge for all samples": rank_one(True, two_layers, batch_reduce=True),
        "a base model with Softplus in it": rank_one(True, lambda: two_layers(nn.Softplus())),
        "dropout": rank_one(True, lambda: two_layers(nn.Dropout(0.5))),
        "a base model whose layers are not fc1 and fc2": rank_one(
            True, lambda: two_layers(nn.Linear(9, 9))
        ),
        "a gate of another kind, or not of one weight per expert": rank_one(True, two_layers),
        "tensors of several dtypes, or on several devices": rank_one(True, two_layers).double(),
        "16-bit tensors, whose products of low rank are rounded twice": rank_one(
            True, two_layers
        ).bfloat16(),
    }
    for reason, model in cases.items():
        if reason.startswith("a gate"):
            model.gate.fc2 = nn.Linear(6, 9)
        given = x.bfloat16() if reason.startswith("16-bit") else x
        outcomes = []
        for function in (fast.function, original):
            torch.manual_seed(0)
            outcomes.append(result(function, model, given))
        assert same(*outcomes)
    assert fast.counts() == (0, dict.fromkeys(cases, 1))


# -- TIES -----------------------------------------------------------------------------------------


def task_vectors(kind: str, count: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(2)
    rows = torch.randn(count, 301)
    if kind == "ties":
        rows = (2 * rows).round() / 2
    elif kind == "cancelling":
        rows = torch.randint(-1, 2, rows.shape).float()
    elif kind == "mostly negative":
        rows = torch.cat([-(2 * rows[:1]).round().abs(), (2 * rows[1:]).round()])
    elif kind == "balanced":  # as many positive sums as negative ones, and as many zeros
        rows = torch.zeros(count, 300)
        rows[:1], rows[1:2] = (
            torch.tensor([1.0, 1, -1]).repeat(100),
            torch.tensor([-1.0, 1, -1]).repeat(100),
        )
    elif kind == "zeros":
        rows = torch.zeros_like(rows)
    elif kind == "not finite":
        rows[0, 5], rows[-1, 7], rows[0, 9] = torch.inf, -torch.inf, torch.nan
    return rows.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kind", ["any", "ties", "cancelling", "mostly negative", "balanced", "zeros", "not finite"]
)
def test_ties_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    original, exact = pair(f"{TIES}:ties_merging", "exact")
    mask, fast_mask = pair(f"{TIES}:topk_values_mask", "exact")
    for count in (1, 2, 5, 20):
        rows = task_vectors(kind, count, dtype)
        for share in (0, 0.2, 20, 1.0, -1, None):
            for how in ("sum", "dis-mean", "max", "medium"):
                got = result(exact.function, rows, share, how)
                assert same(got, result(original, rows, share, how)), (count, share, how)
            got = result(fast_mask.function, rows, share, True)
            assert same(got, result(mask, rows, share, True)), (count, share)
    assert taken(exact) == (0 if kind == "not finite" else 27 if dtype.itemsize > 2 else 18)


def test_accurate_ties_obey_the_rule() -> None:
    original, fast = pair(f"{TIES}:ties_merging", "accurate")
    rows = task_vectors("any", 20, torch.bfloat16)
    for how in ("sum", "mean", "max"):
        got = result(fast.function, rows, 0.2, how)
        working = result(original, rows, 0.2, how)
        oracle = result(original, rows.double(), 0.2, how)
        assert got.dtype == working.dtype
        assert (got.double() - oracle).abs().max() <= (working.double() - oracle).abs().max() + 1e-6
    assert taken(fast) == 3


@pytest.mark.parametrize("keep_vars", [True, False])
def test_vectors_and_back(keep_vars: bool) -> None:
    to, fast_to = pair(f"{TIES}:state_dict_to_vector", "exact")
    back, fast_back = pair(f"{TIES}:vector_to_state_dict", "exact")
    model = nn.ModuleDict(
        {"transformer": nn.ModuleDict({"shared": nn.Linear(3, 2)}), "a": nn.Linear(2, 4)}
    )
    with torch.no_grad():
        state = model.state_dict(keep_vars=keep_vars)
        before = copy.deepcopy(state)
        for removed in ([], ["a.bias", "not there"]):
            vector = fast_to.function(state, removed)
            assert same(vector, to(state, removed))
            assert same(fast_back.function(vector, state, removed), back(vector, state, removed))
            short = result(back, vector[:-1], state, removed)
            assert result(fast_back.function, vector[:-1], state, removed) == short
        assert same(state, before)  # neither writes into it
        tied = {"a": state["a.bias"], "b": state["a.bias"]}
        vector = torch.arange(8.0)
        assert same(fast_back.function(vector, tied), back(vector, tied))
        counted = {"n": torch.tensor(3), **state}
        assert same(result(fast_to.function, counted), result(to, counted))
    assert taken(fast_to) == taken(fast_back) == 2


# -- state dicts ----------------------------------------------------------------------------------


def states(count: int, dtype: torch.dtype = torch.float32, counter: bool = False) -> list[Any]:
    torch.manual_seed(3)
    made = []
    for _ in range(count):
        state: dict[str, Tensor] = {
            "w": torch.randn(3, 5).to(dtype),
            "empty": torch.zeros(0).to(dtype),
        }
        if counter:
            state["seen"] = torch.tensor(3)
        made.append({**state, "one": torch.randn(()).to(dtype)})
    return made


CALLS = {
    "state_dict_sum": [()],
    "state_dict_avg": [()],
    "state_dict_interpolation": [([0.5, -1.5, 0.0],), ([1, 2, 3],), ([0.5],)],
    "state_dict_weighted_sum": [([0.5, 1.0, 0.0],), ([0, 0, 0],), ([0.3, 2, 0.1], "cpu")],
}


@pytest.mark.parametrize("name", CALLS)
def test_state_dicts_to_the_bit(name: str) -> None:
    original, exact = pair(f"{STATES}:{name}", "exact")
    strided = states(3)
    strided[1]["w"] = torch.randn(5, 3).T
    longer, broken = [*states(2), {**states(1)[0], "more": torch.ones(1)}], states(3)
    broken[2]["w"] = torch.ones(4, 5)
    broken[0]["w"][0, 0] = torch.nan
    special = states(3)
    special[2]["w"][1] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 0.0])
    inputs = [
        *(states(3, d, c) for d in DTYPES for c in (False, True)),
        strided,
        longer,
        broken,
        [],
        special,
    ]
    for given in inputs:
        for args in CALLS[name]:
            got = result(exact.function, given, *args)
            assert same(got, result(original, given, *args))
    assert taken(exact) >= 3


@pytest.mark.parametrize("name", CALLS)
def test_accurate_state_dicts_obey_the_rule(name: str) -> None:
    original, fast = pair(f"{STATES}:{name}", "accurate")
    args = CALLS[name][0]
    for dtype in DTYPES:
        given = states(3, dtype)
        double = [{k: x.double() for k, x in state.items()} for state in given]
        oracle, got, working = (
            original(double, *args),
            fast.function(given, *args),
            original(given, *args),
        )
        for key in oracle:
            testing.assert_within_rule(got[key], working[key], oracle[key])
    assert taken(fast) == len(DTYPES)
    tracked = [{"w": torch.ones(2, requires_grad=True)} for _ in range(3)]
    assert fast.function(tracked, *args)["w"].requires_grad
    assert fast.counts().passed == {"a gradient": 1}


# -- WUDI, EMR, TALL, DARE ------------------------------------------------------------------------


def test_wudi_has_the_closed_forms_gradient() -> None:
    original, fast = pair(f"{METHOD}.wudi.wudi:wudi_merging", "accurate")
    torch.manual_seed(4)
    vectors = [
        {"w": 0.01 * torch.randn(6, 4), "b": torch.randn(5), "e": torch.randn(3, 3)}
        for _ in range(3)
    ]
    args = ("cpu", 20, ["e"])
    got, working = result(fast.function, vectors, *args), result(original, vectors, *args)
    oracle = result(original, [{k: x.double() for k, x in v.items()} for v in vectors], *args)
    for key in oracle:
        testing.assert_within_rule(got[key], working[key], oracle[key].detach(), terms=60)
    moved = (oracle["w"] - sum(v["w"].double() for v in vectors)).abs()
    assert moved.min() > 1e-5  # else the steps would not have been compared
    assert isinstance(got["w"], nn.Parameter) and taken(fast) == 1


@pytest.mark.parametrize("kind", ["any", "ties", "cancelling", "zeros", "not finite"])
def test_emr_to_the_bit(kind: str) -> None:
    original, exact = pair(f"{METHOD}.emr_merging.utils:emr_merge", "exact")
    for dtype in (torch.float32, torch.float64):
        rows = task_vectors(kind, 4, dtype)
        vectors = [{"a": row[:300].view(20, 15), "b": row[300:]} for row in rows]
        assert same(exact.function(vectors), original(vectors))
    assert taken(exact) == (0 if kind == "not finite" else 2)


def test_tall_masks_to_the_bit() -> None:
    original, fast = pair(f"{METHOD}.tall_mask.utils:generate_task_masks", "exact")
    torch.manual_seed(5)
    base, models = torch.randn(70000), torch.randn(3, 70000)
    models[0, :9] = torch.tensor([torch.nan, torch.inf, -torch.inf] * 3)
    vectors = models - base
    for dtype in (torch.float32, torch.bfloat16):
        args = [x.to(dtype) for x in (vectors, models, base, vectors.sum(0))]
        for strength in (1.0, 0.4):
            expected = result(original, *args, strength)
            assert same(result(fast.function, *args, strength), expected)
            assert 0.1 < expected.float().mean() < 0.9
    assert same(result(fast.function, *args[:3]), result(original, *args[:3]))
    assert fast.counts().taken == 4


def test_dare_keeps_its_share_and_follows_the_generator() -> None:
    _, fast = pair(f"{METHOD}.dare.utils:param_random_drop_", "accurate")
    start = nn.Parameter(torch.rand(100, 300) + 1)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        param = nn.Parameter(start.detach().clone())
        fast.function(param, 0.75, True)
        kept = param != 0
        assert abs(kept.float().mean() - 0.25) < 0.01
        assert torch.equal(param[kept], start[kept] * 4)
        draws.append(param.detach())
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    everything = nn.Parameter(torch.ones(4))
    result(fast.function, everything, 1, True)
    assert everything.isnan().all()  # 0 / 0, the original's
    assert fast.counts().passed == {"a share to drop that is not in [0, 1)": 1}


# -- Pareto merging -------------------------------------------------------------------------------

PARETO = f"{METHOD}.pwe_moe.module:ParetoWeightEnsemblingModule"


def pareto(dtype: torch.dtype, body: Callable[[], nn.Module], **options: Any) -> Any:
    torch.manual_seed(13)
    kind = importlib.import_module(PARETO.split(":")[0]).ParetoWeightEnsemblingModule
    made = kind(body(), [body() for _ in range(3)], **options).to(dtype)
    made._set_preference_vector(torch.tensor([0.2, 0.5, 0.3], dtype=dtype))
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_preference_merges_as_the_original_does(dtype: torch.dtype) -> None:
    original, fast = pair(f"{PARETO}._merge_state_dict", "accurate")
    results = []
    for function, kind in ((fast.function, dtype), (original, dtype), (original, torch.float64)):
        model = pareto(dtype, mlp).to(kind)
        model.preference_vector = model.preference_vector.to(kind)
        merged = function(model)
        sum(x.double().square().sum() for x in merged.values()).backward()
        results.append(
            (list(merged), [*merged.values(), *(p.grad for p in model.gate.parameters())])
        )
    (names, got), (others, working), (_, oracle) = results
    assert names == others and fast.counts() == (1, {})
    for x, y, z in zip(got, working, oracle, strict=True):
        testing.assert_within_rule(x, y, z, terms=sum(x.numel() for x in got))


def test_what_a_preference_does_not_take() -> None:
    original, fast = pair(f"{PARETO}._merge_state_dict", "accurate")
    cases = {
        "a gradient": pareto(torch.float32, mlp, fix_base_model_and_experts=False),
        "tensors that are no fp32, bf16, fp16 or fp64": pareto(
            torch.float32, lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        ),
    }
    for model in cases.values():
        assert same(result(fast.function, model), result(original, model))
    (model, *_) = cases.values()
    model.preference_vector = None
    assert result(fast.function, model) == result(original, model)
    assert fast.counts() == (0, {**dict.fromkeys(cases, 1), "no preference vector": 1})


# -- readers --------------------------------------------------------------------------------------

READER = "fusion_bench.utils.lazy_state_dict:LazyStateDict._load_tensor_from_checkpoint_file"


def checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(12)
    state = {f"layer.{i}.weight": torch.randn(3, 4).to(dtype) for i in range(9)}
    save_file(state, folder / "model.safetensors")
    return state


@pytest.mark.parametrize("parity", ["exact", "accurate"])
@pytest.mark.parametrize("options", [{}, {"cache_state_dict": True}, {"torch_dtype": "bfloat16"}],
                         ids=str)  # fmt: skip
def test_a_file_is_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parity: str, options: dict[str, Any]
) -> None:
    from fusion_bench.utils.lazy_state_dict import LazyStateDict

    from neulig_fast.compat.fusion_bench import _readers

    state, opened, safe_open = checkpoint(tmp_path), [], _readers.safe_open
    monkeypatch.setattr(
        _readers, "safe_open", lambda path, **how: opened.append(path) or safe_open(path, **how)
    )
    expected = dict(LazyStateDict(str(tmp_path), **options).items())
    with nf.patch("fusion_bench", parity) as patch:
        lazy = LazyStateDict(str(tmp_path), **options)
        assert same(dict(lazy.items()), expected)
        if not options:
            lazy["layer.0.weight"].zero_()  # nobody else's
            assert same(lazy["layer.0.weight"], state["layer.0.weight"])
        with pytest.raises(KeyError):
            lazy["none"]
        assert patch.stats()[READER].passed == {} and patch.stats()[READER].taken >= 9
    assert opened == [str(tmp_path / "model.safetensors")]
    before = len(_readers._OPEN)
    del lazy
    assert len(_readers._OPEN) == before - 1


def test_threads_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusion_bench.utils.lazy_state_dict import LazyStateDict

    from neulig_fast.compat.fusion_bench import _readers

    state, both = checkpoint(tmp_path), threading.Barrier(2, timeout=10)

    class Waiting:
        def __init__(self, path: str, **how: Any) -> None:
            self.file = safe_open(path, **how)

        def get_tensor(self, key: str) -> Tensor:
            both.wait()
            return self.file.get_tensor(key)

    safe_open = _readers.safe_open
    monkeypatch.setattr(_readers, "safe_open", Waiting)
    names = list(state)[:2]
    with nf.patch("fusion_bench"), ThreadPoolExecutor(2) as pool:
        lazy = LazyStateDict(str(tmp_path))
        read = list(pool.map(lazy.__getitem__, names))
    assert same(read, [state[name] for name in names])


def test_a_file_that_has_changed_is_read_anew(tmp_path: Path) -> None:
    from fusion_bench.utils.lazy_state_dict import LazyStateDict

    checkpoint(tmp_path)
    with nf.patch("fusion_bench") as patch:
        lazy = LazyStateDict(str(tmp_path))
        assert lazy["layer.1.weight"].dtype == torch.float32
        save_file({"layer.1.weight": torch.ones(2)}, tmp_path / "other")
        (tmp_path / "other").replace(tmp_path / "model.safetensors")
        assert lazy["layer.1.weight"].tolist() == [1, 1]
        with pytest.raises(SafetensorError):
            lazy["layer.2.weight"]
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError):
            lazy._load_tensor_from_checkpoint_file(str(tmp_path / "model.safetensors"), "x")
        torch.save({"x": torch.ones(3)}, tmp_path / "pytorch_model.bin")
        read = lazy._load_tensor_from_checkpoint_file(str(tmp_path / "pytorch_model.bin"), "x")
        assert read.tolist() == [1, 1, 1]
        assert patch.stats()[READER].passed == {
            "a file that cannot be read": 1,
            "a file that is no safetensors file": 1,
        }


# -- RegMean, copies ------------------------------------------------------------------------------

REGMEAN = (f"{METHOD}.regmean.regmean", f"{METHOD}.regmean_plusplus.regmean_plusplus")


def statistics(dtype: torch.dtype, features: int, models: int, rows: int = 50) -> list[Tensor]:
    torch.manual_seed(7)
    inputs = [torch.randn(rows, features, dtype=torch.float64) for _ in range(models)]
    return [(x.T @ x / rows).to(dtype) for x in inputs]


@pytest.mark.parametrize("module", REGMEAN)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_regmean_shrinks_to_the_bit(module: str, dtype: torch.dtype) -> None:
    original, fast = pair(f"{module}:reduce_non_diagonal_elements", "exact")
    special = torch.tensor([[torch.nan, -0.0], [torch.inf, -torch.inf]])
    for gram in (*statistics(dtype, 7, 2), special.to(dtype), torch.ones(0, 0, dtype=dtype)):
        for ratio in (1.0, 0.9, 1 / 3, 0, 1, -2.5):
            assert same(fast.function(gram, ratio), original(gram, ratio))
    assert fast.counts() == (24, {})
    strided = statistics(dtype, 7, 1)[0].T[::2]
    assert same(result(fast.function, strided, 0.9), result(original, strided, 0.9))
    assert fast.counts().passed == {"strided tensors": 1}


def regmean_case(dtype: torch.dtype, rows: int = 50) -> tuple[dict[str, Any], list[Any]]:
    grams = statistics(dtype, 12, 3, rows)
    torch.manual_seed(8)
    params = {
        "a.weight": [torch.randn(5, 12).to(dtype) for _ in grams],
        "a.bias": [torch.randn(5).to(dtype) for _ in grams],
        "norm.weight": [torch.randn(12).to(dtype) for _ in grams],
    }
    return params, [{"a": gram} for gram in grams]


@pytest.mark.parametrize("module", REGMEAN)
@pytest.mark.parametrize("transposed", [True, False])
def test_regmean_is_no_further_from_the_truth(module: str, transposed: bool) -> None:
    original, fast = pair(f"{module}:merging_with_regmean_weights", "accurate")

    def given(dtype: torch.dtype) -> tuple[Any, ...]:
        params, grams = regmean_case(torch.float32)
        if not transposed:  # GPT-2's layers
            params["a.weight"] = [w.T.contiguous() for w in params["a.weight"]]
        cast = {k: [x.to(dtype) for x in xs] for k, xs in params.items()}
        return cast, [{"a": g["a"].to(dtype)} for g in grams], 0.9, transposed

    oracle = original(*given(torch.float64))
    working, got = original(*given(torch.float32)), fast.function(*given(torch.float32))
    assert list(got) == list(working)
    for key in oracle:
        assert got[key].shape == working[key].shape
        testing.assert_within_rule(got[key], working[key], oracle[key], terms=3 * 12)
    assert fast.counts() == (1, {})


def test_regmean_finds_the_least_squares() -> None:
    """Of layers that are one but for inputs that a model has not seen, that one."""
    _, fast = pair(f"{REGMEAN[0]}:merging_with_regmean_weights", "accurate")
    torch.manual_seed(9)
    truth = torch.randn(4, 6, dtype=torch.float64)
    halves = [
        torch.diag(torch.tensor(d, dtype=torch.float64))
        for d in ([1, 1, 1, 0, 0, 0.5], [0, 0, 0, 2, 2, 0.5])
    ]
    weights = [truth + torch.randn(4, 6).double() @ torch.diag((h.diag() == 0).double())
               for h in halves]  # fmt: skip
    got = fast.function({"a.weight": weights}, [{"a": h} for h in halves])["a.weight"]
    torch.testing.assert_close(got, truth)


def test_what_regmean_does_not_take() -> None:
    original, fast = pair(f"{REGMEAN[0]}:merging_with_regmean_weights", "accurate")
    params, grams = regmean_case(torch.float32)
    missing = [grams[0], {}, grams[2]]
    assert result(fast.function, params, missing) == result(original, params, missing)
    singular = [{"a": torch.zeros(12, 12)}] * 3
    assert result(fast.function, params, singular) == result(original, params, singular)
    half = regmean_case(torch.bfloat16)
    assert result(fast.function, *half) == result(original, *half)
    broken = [{"a": g["a"].clone().fill_(torch.nan)} for g in grams]
    assert same(result(fast.function, params, broken), result(original, params, broken))
    assert len(fast.counts().passed) >= 3 and taken(fast) == 0


STATISTICS = {
    f"{METHOD}.regmean.clip_regmean:RegMeanAlgorithmForCLIP": "batches",
    f"{METHOD}.regmean.gpt2_regmean:RegMeanAlgorithmForGPT2": "batches",
    f"{METHOD}.regmean_plusplus.clip_regmean_plusplus:RegMeanAlgorithmForCLIPPlusPlus": "layer",
}


class Attention(nn.Module):
    """Three layers of one input, one of an input that changes in place, one wider than a block."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o", "up"):
            setattr(self, name, nn.Linear(width, width, dtype=dtype))
        self.down = nn.Linear(2 * width, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.q(x) + self.k(x) * self.v(x)
        self.o(mixed)
        mixed.mul_(2)
        return self.down(torch.cat([self.up(mixed), mixed], -1).relu())


def gathered(where: str, function: Callable[..., Any], model: nn.Module, batches: Any) -> Any:
    """What ``get_regmean_weights`` finds of a model, with an owner that has all it asks for."""
    fabric = types.SimpleNamespace(setup=lambda x: x, setup_dataloaders=lambda x: batches)
    settings = {"num_regmean_examples": 8, "batch_size": 4, "num_workers": 0}
    owner = types.SimpleNamespace(
        fabric=fabric, clip_processor=None, dataloader_kwargs={}, **settings,
        config=types.SimpleNamespace(**settings),
        compute_logits=lambda model, batch, task: model(batch),
        layer_batches_forward=lambda layer, given: [layer(x) for x in given],
    )  # fmt: skip
    layers = {name: x for name, x in model.named_modules() if isinstance(x, nn.Linear)}
    data = batches if STATISTICS[where] == "layer" else [0]
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
        return function(owner, "task", model, data, linear_modules_to_merge=layers)


@pytest.mark.parametrize("where", STATISTICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [5, 200])  # of two and more blocks of columns
def test_regmean_gathers_what_the_original_does(where: str, dtype: torch.dtype, width: int) -> None:
    original, fast = pair(f"{where}.get_regmean_weights", "accurate")
    torch.manual_seed(10)
    model = Attention(width, dtype)
    batches = [torch.randn(4, t, width).to(dtype) for t in (7, 3, 5)]  # the third is one too many
    working = gathered(where, original, model, batches)
    got = gathered(where, fast.function, model, batches)
    oracle = gathered(where, original, copy.deepcopy(model).double(), [x.double() for x in batches])
    assert list(got) == list(working) and fast.counts() == (1, {})
    for name, gram in got.items():
        if dtype is torch.bfloat16 or width == 5:  # the original's product, for some made once
            assert same(gram, working[name])
        else:
            testing.assert_within_rule(gram, working[name], oracle[name], terms=48)
    assert same(got["q"], got["v"]) and not any(x._forward_hooks for x in model.modules())


def test_regmean_makes_one_product_of_one_input(monkeypatch: pytest.MonkeyPatch) -> None:
    from neulig_fast.compat.fusion_bench import _regmean_statistics

    made: list[Tensor] = []
    square = _regmean_statistics._square
    monkeypatch.setattr(_regmean_statistics, "_square", lambda x: made.append(x) or square(x))
    (where, *_) = STATISTICS
    _, fast = pair(f"{where}.get_regmean_weights", "accurate")
    batches = [torch.randn(8, 3, 200)]
    gathered(where, fast.function, Attention(200, torch.float32), batches)
    assert [x.shape[1] for x in made] == [200, 200, 200, 400]  # q, k and v; o; up; down
    made.clear()
    with torch.inference_mode():  # where nothing tells whether an input has changed
        gathered(where, fast.function, Attention(200, torch.float32), [batches[0].clone()])
    assert len(made) == 6


def test_copies_are_the_same_functions() -> None:
    from neulig_fast.compat.fusion_bench import _copies

    torch.manual_seed(11)
    state = {"b": torch.randn(3, 4), "a": torch.randn(5), "n": torch.randn(())}
    rows = task_vectors("ties", 3, torch.float32)
    for seam in _copies.seams():
        original, fast = pair(seam.where, "exact")
        name = seam.where.split(":")[1]
        calls = {
            "state_dict_to_vector": [(state,), (state, ["a"])],
            "vector_to_state_dict": [(torch.randn(18), state), (torch.randn(13), state, ["a"])],
            "topk_values_mask": [(rows, 0.2), (rows, 20, True)],
            "ties_merging": [(rows, 20, "sum"), (rows, 0.3, "max")],
        }[name]
        for args in calls:
            assert same(result(fast.function, *args), result(original, *args))
        assert fast.counts() == (len(calls), {})


def test_a_gate_runs_once_whoever_takes_the_call() -> None:
    original, fast = pair(f"{EXPERTS}.forward", "accurate")
    x, runs = torch.randn(4, 5, 6), []
    for gate in ("one weight short", "of another kind"):
        model = experts_module(True, mlp)
        if gate == "one weight short":
            model.gate.fc2 = nn.Linear(6, 2)
        else:
            model.gate = nn.Sequential(nn.Linear(6, 3))
            model.gate.num_hidden_layers = 1
        model.gate.register_forward_hook(lambda *_: runs.append(1))
        runs.clear()
        got = fast.function(model, x)
        assert len(runs) == 1
        assert same(got, original(model, x))
    reason = "a gate of another kind, or not of one weight per expert"
    assert fast.counts() == (0, {reason: 2})


# -- the patch ------------------------------------------------------------------------------------


def test_the_patch_is_found_everywhere_and_undone() -> None:
    if not HOST.versions.contains(Version(metadata.version("fusion_bench")).base_version):
        pytest.skip(f"FusionBench is not {HOST.versions}")
    originals = {seam.where: Place(seam.where).get() for seam in HOST.seams()}
    user = importlib.import_module(f"{METHOD}.emr_merging.utils")
    with nf.patch("fusion_bench") as handle:
        assert set(handle.seams) == set(originals)
        assert user.state_dict_sum(states(2))["w"].shape == (3, 5)
        assert handle.stats()[f"{STATES}:state_dict_sum"] == (1, {})
        model = merged_model("layer")
        model(torch.randn(4, 5)).sum().backward()
        assert model.merge_weight.grad.abs().sum() > 0
        assert handle.stats()[WHERE["layer"]].taken == 1
    assert {where: Place(where).get() for where in originals} == originals
    assert user.state_dict_sum is originals[f"{STATES}:state_dict_sum"]


# -- classes --------------------------------------------------------------------------------------


def pool_of(make: Callable[[], nn.Module], **datasets: Any) -> Any:
    base = importlib.import_module("fusion_bench").BaseModelPool
    torch.manual_seed(6)
    models = {name: make() for name in ("_pretrained_", "cats", "dogs")}
    return base(models, train_datasets=datasets or None)


def dense() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))


def test_classes_take_the_originals_keys_and_give_its_model() -> None:
    ours = importlib.import_module("neulig_fast.compat.fusion_bench").TiesMerging
    theirs = importlib.import_module(f"{METHOD}.ties_merging.ties_merging").TiesMergingAlgorithm
    keys = {"scaling_factor": 0.3, "threshold": 20, "remove_keys": [], "merge_func": "sum"}
    algorithm = ours(**keys)
    assert algorithm.config["_target_"] == "neulig_fast.compat.fusion_bench.TiesMerging"
    assert dict(algorithm.config).items() >= keys.items()
    got = result(algorithm.run, pool_of(dense))
    assert same(got.state_dict(), result(theirs(**keys).run, pool_of(dense)).state_dict())
    assert nf.patch.status() == ()


def test_neulig_and_mudsc_are_methods() -> None:
    from neulig_fast.compat import fusion_bench as compat

    data = {
        name: torch.utils.data.TensorDataset(torch.randn(20, 3, 2, 2), torch.randint(5, (20,)))
        for name in ("cats", "dogs")
    }
    pool = pool_of(dense)
    pool.load_train_dataset = data.__getitem__
    heads = {name: torch.randn(5, 4) for name in data}
    merged = compat.NeuLigAlgorithm(heads, "dogs", epochs=2, batch_size=8).run(pool)
    engine = nf.NeuLig(
        [pool.load_model(n) for n in data], {n: nf.Head(h) for n, h in heads.items()}
    )
    batches = {n: torch.utils.data.DataLoader(d, 8) for n, d in data.items()}
    engine.fit(batches, epochs=2, batch_size=8, progress=False)
    assert same(dict(merged.state_dict()), dict(engine.merge("dataset", task="dogs")))
    with pytest.raises(ValueError, match="no model birds in the pool: cats, dogs"):
        compat.NeuLigAlgorithm({"birds": heads["cats"]}, "cats").run(pool)
    experts = [pool.load_model(name) for name in data]
    aligned = compat.MuDSCAlgorithm(balance=1.0).run(pool)
    assert same(dict(aligned.state_dict()), dict(nf.align(experts, balance=1.0).merge()))


def test_without_fusion_bench_a_class_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    compat = importlib.import_module("neulig_fast.compat.fusion_bench")
    vars(compat).pop("TiesMerging", None)

    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compat, "version", version)
    with pytest.raises(
        ImportError, match=r"TiesMerging needs FusionBench: pip install fusion_bench"
    ):
        _ = compat.TiesMerging
    with pytest.raises(AttributeError, match="has no attribute 'TiesMergin'"):
        _ = compat.TiesMergin
