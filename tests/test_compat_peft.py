"""peft's merges under the patch: bit for bit, against fp64, and whole models with ``svd``."""

import copy
import importlib.util

import pytest
import torch

import neulig_fast as nf
from neulig_fast import testing
from neulig_fast.compat import peft as compat


class Lazy:
    """A module that is imported when it is used: not by every process that collects tests."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        return getattr(importlib.import_module(self._name), attribute)


peft, merging = Lazy("peft"), Lazy("peft.utils.merge_utils")
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False"),
    pytest.mark.skipif(
        importlib.util.find_spec("peft") is None,
        reason="peft is not installed: pip install neulig-fast[hosts]",
    ),
]
DTYPES = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
SVD = "peft.tuners.lora.model:LoraModel._svd_generalized_task_arithmetic_weighted_adapter"
MERGES = ("task_arithmetic", "magnitude_prune", "ties")


@pytest.fixture(autouse=True)
def _undone(monkeypatch):
    monkeypatch.setattr(compat, "SMALL", 0)
    yield
    for handle in nf.patch.status():
        handle.undo()


def arguments(name, density=0.3, method="total"):
    more = {"ties": (density, method), "dare_ties": (density, method), "task_arithmetic": ()}
    return more.get(name, (density,))


def draw(count, shape, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(count)]


def adversarial():
    """Lists of three tensors: ordinary, tied, zeros, not finite, none, one element, strided."""
    ordinary = draw(3, (13, 70), torch.float32)
    yield "ordinary", ordinary
    yield "tied", [(2 * tensor).round() for tensor in ordinary]
    yield "mostly zero", [torch.where(x > 1.5, x, 0.0) for x in ordinary]
    yield "zeros", [torch.zeros(4, 5), -torch.zeros(4, 5), torch.zeros(4, 5)]
    broken = [tensor.clone() for tensor in ordinary]
    broken[0][0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    yield "not finite", broken
    yield "empty", [torch.zeros(0, 3)] * 3
    yield "one element", draw(3, (1,), torch.float32)
    yield "no dimensions", draw(3, (), torch.float32)
    yield "strided", [tensor.T[:, ::2] for tensor in ordinary]
    yield "opposed", [ordinary[0], -ordinary[0], ordinary[0]]
    yield "more than four", draw(6, (9, 30), torch.float32)


def bits(tensor):
    """To compare zeros' signs; all NaN alike."""
    return torch.where(tensor.isnan(), torch.nan, tensor).contiguous().numpy().tobytes()


def calls(name):
    """Arguments of a function of merge_utils."""
    for _, tensors in adversarial():
        for density in (0.0, 0.01, 0.5, 0.99, 1.0):
            weights = torch.tensor([0.7, -0.4, 1.3, 0.2, 0.1, 1.0][: len(tensors)])
            if name == "magnitude_based_pruning":
                yield tensors[0], density
                continue
            for method in ("total", "frequency"):
                yield tensors, weights, *arguments(name, density, method)


@pytest.mark.parametrize("name", [*MERGES, "magnitude_based_pruning"])
@pytest.mark.filterwarnings("ignore:The density 1.0 is greater")
def test_exact_parity_gives_the_hosts_bits(name):
    expected = [getattr(merging, name)(*given) for given in calls(name)]
    with nf.patch("peft", "exact") as patch:
        results = [getattr(merging, name)(*given) for given in calls(name)]
        taken = patch.stats()[f"peft.utils.merge_utils:{name}"].taken
    for got, wanted in zip(results, expected, strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert bits(got) == bits(wanted)
    assert taken >= 25


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_exact_parity_in_other_types(dtype):
    tensors = draw(3, (40,), dtype, seed=3)
    given = [
        (name, (tensors, weights, *arguments(name)))
        for name in MERGES
        for weights in (torch.tensor([0.7, -0.4, 1.3]), torch.tensor([1, 2, 3]))
    ]
    expected = [getattr(merging, name)(*each) for name, each in given]
    with nf.patch("peft", "exact") as patch:
        results = [getattr(merging, name)(*each) for name, each in given]
        taken = sum(counts.taken for counts in patch.stats().values())
    for got, wanted in zip(results, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert bits(got.double()) == bits(wanted.double())
    assert taken >= 3


def oracle(name, tensors, weights, density=0.3, method="total"):
    """The formulas in fp64, expert by expert; tied magnitudes: the first ones stay."""
    stacked = torch.stack([tensor.double().flatten() for tensor in tensors])
    if name != "task_arithmetic":
        order = stacked.abs().argsort(dim=1, descending=True, stable=True)
        kept = torch.zeros_like(stacked, dtype=torch.bool)
        kept.scatter_(1, order[:, : int(density * stacked.shape[1])], True)
        stacked = stacked * kept
    terms = stacked * weights.double()[:, None]
    if name != "ties":
        return terms.sum(0).view(tensors[0].shape)
    votes = stacked if method == "total" else stacked.sign()
    positive = votes.sum(0) >= 0
    agrees = torch.where(positive, stacked > 0, stacked < 0)
    merged = (terms * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return merged.view(tensors[0].shape)


@DTYPES
@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("count", [1, 3, 6])
def test_accurate_parity_is_at_least_as_exact_as_the_host(dtype, name, count):
    tensors = draw(count, (33, 20), dtype, seed=5)
    tensors[0] = tensors[0].T.contiguous().T
    weights = torch.linspace(0.2, 0.9, count, dtype=torch.promote_types(dtype, torch.float32))
    wide = [tensor.double() for tensor in tensors]
    options = [arguments(name, method=method) for method in ("total", "frequency")]
    exact = [oracle(name, wide, weights, *more) for more in options]
    if dtype.itemsize > 2:  # no ties: the host agrees with the formulas
        for one, more in zip(exact, options, strict=True):
            assert torch.allclose(getattr(merging, name)(wide, weights.double(), *more), one)
    with nf.patch("peft") as patch:
        results = [getattr(merging, name)(tensors, weights, *more) for more in options]
        assert patch.stats()[f"peft.utils.merge_utils:{name}"] == (2, {})
    for got, one in zip(results, exact, strict=True):
        testing.assert_within_rule(got, one.to(got.dtype), one, count)


@pytest.mark.parametrize("weights", [torch.ones(2).bfloat16(), torch.ones(2).long()], ids=str)
@pytest.mark.parametrize("name", ["ties", "dare_ties", "dare_linear", "magnitude_prune"])
def test_results_have_the_hosts_type(name, weights):
    tensors = draw(2, (8, 5), torch.bfloat16, seed=6)
    expected = getattr(merging, name)(tensors, weights, 0.5).dtype
    with nf.patch("peft") as patch:
        assert getattr(merging, name)(tensors, weights, 0.5).dtype == expected
    assert patch.stats()[f"peft.utils.merge_utils:{name}"].taken == 1


def test_random_masks_have_the_share_and_the_scale_and_torchs_seed():
    ones, weights, density = torch.ones(400, 500), torch.tensor([1.0, 1.0]), 0.3
    with nf.patch("peft") as patch:
        pruned = merging.random_pruning(ones, density, rescale=True)
        plain = merging.random_pruning(ones, density, rescale=False)
        torch.manual_seed(7)
        first = merging.dare_linear([ones, ones], weights, density)
        other = merging.dare_linear([ones, ones], weights, density)
        torch.manual_seed(7)
        again = merging.dare_linear([ones, ones], weights, density)
        agreed = merging.dare_ties([ones, -3 * ones], weights, density)
        assert all(not counts.passed for counts in patch.stats().values())
    assert set(plain.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(pruned.unique(), torch.tensor([0.0, 1 / density]))
    spread = (density * (1 - density) / ones.numel()) ** 0.5
    assert abs(float((pruned != 0).double().mean()) - density) < 5 * spread
    assert torch.equal(first, again) and not torch.equal(first, other)
    both = float((first > 1.5 / density).double().mean())  # masks of the two are independent
    assert abs(both - density**2) < 0.005
    assert torch.allclose(agreed.unique(), torch.tensor([-3.0, 0.0, 1.0]) / density)


def test_what_the_originals_get_and_why(monkeypatch):
    tensors, weights = draw(2, (6,), torch.float32), torch.ones(2)
    monkeypatch.setattr(compat, "SMALL", 13)
    seam = "peft.utils.merge_utils:ties"
    with nf.patch("peft") as patch:
        with pytest.raises(ValueError, match="Density should be >= 0, got -1"):
            merging.ties(tensors, weights, -1)
        with pytest.warns(UserWarning, match="no pruning will be performed"):
            merging.ties(tensors, weights, 1.0)
        with pytest.raises(RuntimeError, match="Unimplemented mask method"):
            merging.ties(tensors, weights, 0.5, "loudest")
        with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
            merging.ties([tensors[0], tensors[1][:3]], weights, 0.5)
        with pytest.raises(RuntimeError):
            merging.ties(tensors, torch.ones(3), 0.5)
        leaf = tensors[0].clone().requires_grad_()
        merging.ties([leaf, tensors[1]], weights, 0.5).sum().backward()
        assert leaf.grad is not None
        merging.ties([t.to("meta") for t in tensors], weights.to("meta"), 0.5)
        merging.dare_linear(tensors, weights, 0.0)
        merging.task_arithmetic(tensors, weights)
        (small,) = patch.stats()["peft.utils.merge_utils:task_arithmetic"].passed
        (zero,) = patch.stats()["peft.utils.merge_utils:dare_linear"].passed
        assert small.startswith("a weighted sum of small") and zero.startswith("a density of 0,")
        passed = patch.stats()[seam].passed
    assert dict(passed) == {
        "a density that is not between 0 and 1": 2,
        "an unknown way to elect a sign": 1,
        "tensors of several shapes": 1,
        "weights that are not one number per tensor": 1,
        "a gradient": 1,
        "tensors without memory, or on an unknown device": 1,
    }


# -- models ----------------------------------------------------------------------------------------


class Layers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 12)
        self.linear = torch.nn.Linear(12, 10)
        self.transposed = Lazy("transformers.pytorch_utils").Conv1D(14, 10)
        self.pointwise = torch.nn.Conv2d(6, 8, 1)
        self.conv = torch.nn.Conv2d(8, 9, 3)


def adapted(ranks):
    torch.manual_seed(0)
    names = ["embedding", "linear", "transposed", "pointwise", "conv"]
    model = Layers()
    for k, rank in enumerate(ranks):
        config = peft.LoraConfig(r=rank, lora_alpha=3, target_modules=names)
        if k == 0:
            model = peft.get_peft_model(model, config, adapter_name="a0")
        else:
            model.add_adapter(f"a{k}", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


def merged_layers(model):
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            yield name, module


@pytest.mark.parametrize("ranks, rank", [((2, 2), None), ((2, 3, 1), 4), ((1, 2), 1)])
def test_svd_is_the_best_approximation_and_the_hosts(ranks, rank):
    model = adapted(ranks)
    twin, names = copy.deepcopy(model), [f"a{k}" for k in range(len(ranks))]
    weights = [0.7, -0.4, 1.1][: len(ranks)]
    twin.add_weighted_adapter(names, weights, "all", svd_rank=rank)
    with nf.patch("peft") as patch:
        model.add_weighted_adapter(names, weights, "all", svd_rank=rank)
        counts = patch.stats()[SVD]
    assert counts == (5, {})
    for (name, ours), (_, theirs) in zip(merged_layers(model), merged_layers(twin), strict=True):
        whole = sum(w * ours.get_delta_weight(a) for a, w in zip(names, weights, strict=True))
        got, other = (layer.get_delta_weight("all") for layer in (ours, theirs))
        assert torch.allclose(got, other, atol=1e-4, rtol=1e-4), name
        flat = whole.double().flatten(1)
        values = torch.linalg.svdvals(flat)
        error = (got.double().flatten(1) - flat).norm()
        least = values[rank or max(ranks) :].norm()
        assert abs(error - least) <= 1e-5 * values[0], name
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_svd_leaves_to_the_original_what_it_must():
    model = adapted((2, 2))
    names, weights = ["a0", "a1"], [0.5, 0.5]
    with nf.patch("peft") as patch:
        model.add_weighted_adapter(names, weights, "clamped", svd_clamp=0.9)
        model.add_weighted_adapter(names, weights, "wide", svd_rank=3)
        model.add_weighted_adapter(names, weights, "ties", "ties_svd", density=0.5)
        model.add_weighted_adapter(names, weights, "linear", "linear")
        assert patch.stats()["peft.utils.merge_utils:ties"].taken == 0
        with torch.no_grad():
            model.add_weighted_adapter(names, weights, "again", "ties_svd", density=0.5)
        assert patch.stats()["peft.utils.merge_utils:ties"].taken == 5
        passed = dict(patch.stats()[SVD].passed)
        assert patch.stats()["peft.utils.merge_utils:task_arithmetic"].taken >= 10
    assert passed == {
        "svd_clamp, which depends on the signs of singular vectors": 5,
        "combination_type ties_svd: its sum has no factors": 10,
    }


def test_undo_restores_every_name():
    from peft.tuners.lora import model

    names = ("dare_linear", "dare_ties", "magnitude_prune", "task_arithmetic", "ties")
    before = [getattr(model, name) for name in names]
    with nf.patch("peft"):
        assert all(getattr(model, n) is getattr(merging, n) for n in names)
        assert [getattr(model, name) for name in names] != before
    assert [getattr(model, name) for name in names] == before
