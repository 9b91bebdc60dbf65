"""mergekit under ``nf.patch``: mergekit's own results, closed forms, and what it does not take."""

from __future__ import annotations

import importlib
import pickle
import shutil
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neulig_fast as nf
from neulig_fast import testing
from neulig_fast.compat import Patch, mergekit_yaml
from neulig_fast.compat.mergekit import HOST

NO_MERGEKIT = "mergekit is not installed: pip install mergekit"
methods = pytest.importorskip("mergekit.merge_methods", reason=NO_MERGEKIT)
sparsifying = importlib.import_module("mergekit.sparsify")
registry = importlib.import_module("mergekit.merge_methods.registry")

WEIGHTS = [0.3, 0.6, 0.25]
DROPPED = {"weight": WEIGHTS, "density": [0.4, 0.7, 1.0]}
# Parameters of every method that is replaced, the number of its experts, and its seam.
ARITHMETIC = "GeneralizedTaskArithmeticMerge.merge_group"
METHODS: dict[str, tuple[dict[str, Any], int, str]] = {
    "task_arithmetic": ({"weight": WEIGHTS, "lambda": 0.8, "normalize": True}, 3, ARITHMETIC),
    "ties": (DROPPED, 3, ARITHMETIC),
    "breadcrumbs": ({**DROPPED, "gamma": 0.05, "rescale": True}, 3, ARITHMETIC),
    "breadcrumbs_ties": ({**DROPPED, "gamma": [0.1, 0.05, 0.0], "lambda": 1.5}, 3, ARITHMETIC),
    "linear": ({"weight": [0.2, 0.3, 0.6, 0.25]}, 3, "linear_merge.implementation"),
    "slerp": ({"t": 0.3}, 1, "slerp"),
    "nuslerp": ({"weight": [0.3, 0.5]}, 2, "nuslerp_merge_method.implementation"),
    "multislerp": ({"weight": WEIGHTS}, 3, "multislerp.implementation"),
    "karcher": ({}, 3, "karcher_merge_tensors"),
    "model_stock": ({}, 3, "model_stock_merge_method.implementation"),
    "sce": ({"select_topk": 0.4}, 3, "sce_merge.implementation"),
    "ram": ({"epsilon": 0.3}, 3, "ram_merge.implementation"),
    "nearswap": ({"t": 0.3}, 1, "nearswap_merge.implementation"),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def family(*shape: int, experts: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A base, first, and experts."""
    generator = torch.Generator().manual_seed(sum(shape) + experts)
    base = torch.randn(shape, generator=generator)
    others = [base + torch.randn(shape, generator=generator) for _ in range(experts)]
    return [tensor.to(dtype) for tensor in (base, *others)]


def merge(name: str, tensors: list[Tensor], **parameters: Any) -> Tensor:
    return methods.merge_tensors(tensors, name, parameters=parameters, base_index=0, name="x")


def counts(patch: Patch, seam: str) -> tuple[int, dict[str, int]]:
    (found,) = (n for where, n in patch.stats().items() if where.endswith(f":{seam}"))
    return found.taken, dict(found.passed)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, any NaN being one."""
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))


# -- whole methods --------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(7, 59), (1,), ()], ids=str)
def test_accurate_is_no_further_from_the_truth(
    name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    parameters, experts, seam = METHODS[name]
    tensors = family(*shape, experts=experts, dtype=dtype)
    theirs = merge(name, tensors, **parameters)
    truth = merge(name, [tensor.double() for tensor in tensors], **parameters)
    with nf.patch("mergekit") as patch:
        ours = merge(name, tensors, **parameters)
    taken, passed = counts(patch, seam)
    assert taken + sum(passed.values()) == 1 and (taken or len(shape) < 2), passed
    if name == "sce" and dtype == torch.bfloat16:
        return  # which elements vary most is another question once task vectors are rounded
    testing.assert_within_rule(ours, theirs, truth, terms=4 * max(1, ours.numel()))


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "breadcrumbs_ties"])
@pytest.mark.parametrize("elements", [1, 3, 1000, 300_001])
def test_exact_has_mergekits_bits(name: str, elements: int) -> None:
    parameters, _, seam = METHODS[name]
    tensors = family(elements)
    expected = merge(name, tensors, **parameters)
    with nf.patch("mergekit", "exact") as patch:
        assert same(merge(name, tensors, **parameters), expected)
    assert counts(patch, seam) == (1, {})


@each_dtype
@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties", "della", "dare_ties"])
def test_exact_has_mergekits_bits_whoever_merges(name: str, dtype: torch.dtype) -> None:
    tensors = family(5, 40, dtype=torch.float32)
    tensors[0] = torch.zeros_like(tensors[0])  # a task vector without equal magnitudes
    tensors = [tensor.to(dtype) for tensor in tensors]
    parameters = {"weight": WEIGHTS, "density": 0.5, "rescale": True, "normalize": True}
    results = []
    for parity in (None, "exact"):
        torch.manual_seed(3)
        if parity is None:
            results.append(merge(name, tensors, **parameters))
            continue
        with nf.patch("mergekit", parity):
            results.append(merge(name, tensors, **parameters))
    if dtype != torch.bfloat16 or name in ("della", "dare_ties"):
        assert same(*results)
    else:  # a handful of equal magnitudes at a threshold
        assert (results[0] != results[1]).float().mean() < 0.1


@pytest.mark.parametrize("models", [2, 7])
@each_dtype
def test_ram_is_exact_in_blocks(models: int, dtype: torch.dtype) -> None:
    tensors = family(150_007, experts=models, dtype=dtype)
    expected = merge("ram", tensors, epsilon=0.5)
    with nf.patch("mergekit", "exact") as patch:
        assert same(merge("ram", tensors, epsilon=0.5), expected)
    assert counts(patch, "ram_merge.implementation") == (1, {})


@pytest.mark.parametrize("models", [1, 2, 7])
@each_dtype
def test_the_majority_of_signs_is_exact_in_blocks(models: int, dtype: torch.dtype) -> None:
    where = "mergekit.merge_methods.generalized_task_arithmetic"
    module = importlib.import_module(where)
    delta = torch.stack(family(150_007, experts=models, dtype=dtype)[1:]).view(models, 11, -1)
    delta[:, :, ::5] = (2 * delta[:, :, ::5]).round()  # sums of zero among them
    delta[0, 0, 1:4] = torch.tensor([torch.inf, torch.nan, -0.0])
    calls = [(method, kind) for method in ("sum", "count") for kind in (None, torch.int8)]
    expected = [module.get_mask(delta, *call) for call in calls]
    for parity in ("exact", "accurate"):
        with nf.patch("mergekit", parity) as patch:
            got = [module.get_mask(delta, *call) for call in calls]
            with pytest.raises(RuntimeError, match="Unimplemented mask method"):
                module.get_mask(delta, "loudest")
            module.get_mask(delta[:, 0, 0].clone())
        assert all(map(torch.equal, got, expected))
        assert counts(patch, "get_mask") == (4, {"no axis but that of the models": 1})


@pytest.mark.parametrize("t", [0.3, 0.0, -1.0, 1e9])
@each_dtype
def test_nearswap_is_exact_in_blocks(t: float, dtype: torch.dtype) -> None:
    tensors = family(150_007, experts=1, dtype=dtype)
    tensors[1][:9] = tensors[0][:9]
    tensors[1][9:13] = torch.tensor([torch.inf, torch.nan, -torch.inf, -0.0])
    expected = merge("nearswap", tensors, t=t)
    with nf.patch("mergekit", "exact") as patch:
        assert same(merge("nearswap", tensors, t=t), expected)
    assert counts(patch, "nearswap_merge.implementation") == (1, {})


def test_nearswap_by_hand() -> None:
    with nf.patch("mergekit"):
        got = merge("nearswap", [torch.tensor([0.0, 0, 8, 1]), torch.tensor([1.0, 4, 0, 1])], t=2)
    assert got.tolist() == [1, 2, 6, 1]  # no further than t, or all the way


@pytest.mark.parametrize("parity", ["exact", "accurate"])
@pytest.mark.parametrize("name", ["ties", "dare_ties"])
def test_methods_of_our_names_are_accurate_in_either_parity(name: str, parity: str) -> None:
    tensors = family(500, dtype=torch.bfloat16)
    torch.manual_seed(4)
    with nf.patch("mergekit"):
        expected = merge(name, tensors, **DROPPED)
    broken = [x.clone() for x in tensors]
    broken[1][3] = torch.nan
    with nf.patch("mergekit", parity) as patch:
        torch.manual_seed(4)
        assert same(merge(f"nf_{name}", tensors, **DROPPED), expected)
        assert counts(patch, ARITHMETIC) == (0, {})
        assert merge(f"nf_{name}", broken, **DROPPED)[3].isnan() or name == "dare_ties"
        assert sum(counts(patch, ARITHMETIC)[1].values()) == (name == "ties")
        with pytest.raises(TypeError, match=f"parameter weight for nf_{name}"):
            merge(f"nf_{name}", tensors)
        copied = pickle.loads(pickle.dumps(registry._METHODS[f"nf_{name}"]))
    assert copied.method_name == f"nf_{name}" and "(neulig_fast)" in copied.method_pretty_name
    assert f"nf_{name}" not in registry._METHODS


def test_ties_by_hand() -> None:
    base = torch.zeros(4)
    experts = [torch.tensor([4.0, -3, 1, 0.5]), torch.tensor([-1.0, -2, 5, 3])]
    with nf.patch("mergekit"):
        got = merge("ties", [base, *experts], weight=[1.0, 2.0], density=0.75)
    # Kept: 4, -3, 1 and -2, 5, 3; elected: +, -, +, +.
    assert got.tolist() == pytest.approx([4, (-3 - 4) / 3, (1 + 10) / 3, 3])


@pytest.mark.parametrize("elected", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dare_keeps_a_share_and_the_sum_of_magnitudes(elected: bool, dtype: torch.dtype) -> None:
    base, *experts = family(100_000, experts=2, dtype=dtype)
    name = "dare_ties" if elected else "dare_linear"

    def drawn(seed: int, tensors: list[Tensor], weights: list[float]) -> Tensor:
        torch.manual_seed(seed)
        with nf.patch("mergekit") as patch:
            merged = merge(name, [base, *tensors], weight=weights, density=0.3)
        assert counts(patch, ARITHMETIC) == (1, {})
        return merged

    first, again, other = (drawn(seed, experts[:1], [1.0]) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    d, change = experts[0].double() - base.double(), first.double() - base.double()
    share = float((first != base).double().mean())
    assert abs(share - 0.3) < 0.01
    kept = (first != base) & (d != 0)
    scale = d.abs().sum() / d[kept].abs().sum()
    allowed = 2 * torch.finfo(dtype).eps * float(first.abs().max())
    assert (change[kept] - scale * d[kept]).abs().max() < max(allowed, 1e-5)
    both = drawn(1, experts, [0.5, 0.5]).double() - base.double()
    halves = 0.5 * change  # the first expert's draws do not depend on the second's
    alone = (both - halves).abs() < max(allowed, 1e-5)
    assert bool(alone[kept].any()) and not bool(alone[kept].all())


def test_random_numbers_follow_torch_and_move_on() -> None:
    tensors = family(1000)
    torch.manual_seed(0)
    with nf.patch("mergekit"):
        first, second = (merge("dare_ties", tensors, **DROPPED) for _ in range(2))
    assert not torch.equal(first, second)


# -- what goes to the original --------------------------------------------------------------------

HOSTILE: dict[str, tuple[Callable[[list[Tensor]], list[Tensor]], str]] = {
    "empty": (lambda all_: [x[:0] for x in all_], "no elements"),
    "a gradient": (lambda all_: [x.clone().requires_grad_() for x in all_], "a gradient"),
    "complex": (lambda all_: [x.cfloat() for x in all_], "tensors that are no fp32"),
    "meta": (lambda all_: [x.to("meta") for x in all_], "tensors without memory"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_not_taken_goes_to_mergekit(case: str) -> None:
    change, reason = HOSTILE[case]
    tensors = change(family(6, 8))
    group = methods.TensorGroup.from_tensors(tensors, base_index=0)
    for parity in ("exact", "accurate"):
        with nf.patch("mergekit", parity) as patch:
            parameters = {"weight": dict(zip((1, 2, 3), WEIGHTS, strict=True))}
            bound = methods.PerInputValues([*parameters["weight"].items()])
            ask = {"rescale": False, "normalize": False, "lambda": 1.0, "int8_mask": False}
            merged = methods.get("task_arithmetic").merge_group(group, weight=bound, **ask)
        assert merged.shape == tensors[0].shape
        assert [why.startswith(reason) for why in counts(patch, ARITHMETIC)[1]] == [True]


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "dare_ties", "slerp"])
def test_strides_do_not_matter(name: str) -> None:
    tensors = family(6, 8, experts=1 if name == "slerp" else 3)
    parameters = {"t": 0.3} if name == "slerp" else {"weight": WEIGHTS}
    dense = [tensor.t().contiguous() for tensor in tensors]
    for parity in ("exact", "accurate"):
        with nf.patch("mergekit", parity) as patch:
            results = []
            for given in ([tensor.t() for tensor in tensors], dense):
                torch.manual_seed(0)
                results.append(merge(name, given, **parameters))
        if name == "slerp":
            assert parity == "exact" or counts(patch, "slerp") == (1, {"strided tensors": 1})
            torch.testing.assert_close(*results)
        else:
            assert torch.equal(*results)


@pytest.mark.parametrize(
    ("name", "parameters", "seam", "reason"),
    [
        ("nuslerp", {"weight": [1.0, 2.0], "nuslerp_flatten": False}, "nuslerp", "rows or columns"),
        ("model_stock", {"filter_wise": True}, "model_stock", "rows"),
        ("ties", {"weight": 1.0, "density": -1.0}, ARITHMETIC, "settings out of bounds: density"),
        ("breadcrumbs", {"weight": 1.0, "gamma": -1.0}, ARITHMETIC, "settings out of bounds: gam"),
        ("sce", {"select_topk": 0.0}, "sce", "no elements are selected"),
    ],
)
def test_settings_that_are_not_taken(
    name: str, parameters: dict[str, Any], seam: str, reason: str
) -> None:
    tensors = family(4, 6, experts=2)
    expected = merge(name, tensors, **parameters)
    with nf.patch("mergekit") as patch:
        assert same(merge(name, tensors, **parameters), expected)
    whys = [why for where, n in patch.stats().items() if seam in where for why in n.passed]
    assert len(whys) == 1 and whys[0].startswith(reason)


def test_mergekits_errors_stay_mergekits() -> None:
    tensors = family(4, 6)
    with nf.patch("mergekit"), pytest.raises(ValueError, match="Epsilon must be chosen"):
        merge("della", tensors, weight=1.0, density=0.9, epsilon=0.3)
    opposite = [tensors[1], -tensors[1]]
    with nf.patch("mergekit"), pytest.raises(ValueError, match="antipodal"):
        three = [torch.zeros(4, 6), *opposite, torch.zeros(4, 6)]
        merge("multislerp", three, weight=[1.0, 1.0, 1.0])


@pytest.mark.parametrize("parity", ["exact", "accurate"])
@pytest.mark.parametrize("name", ["ties", "task_arithmetic", "breadcrumbs", "ram", "linear"])
def test_a_broken_expert_looks_broken(name: str, parity: str) -> None:
    parameters, _, _ = METHODS[name]
    for value in (torch.nan, torch.inf):
        tensors = family(40)
        tensors[1][7] = value
        with nf.patch("mergekit", parity):
            merged = merge(name, tensors, **parameters)
        # Without 5 % of the largest, infinity is what mergekit and we drop.
        assert not bool(merged[7].isfinite()) or name == "breadcrumbs"


# -- parts ----------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("method", ["magnitude", "magnitude_outliers"])
@pytest.mark.parametrize("norm", [None, "l1"])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.5, 0.97, 1.0])
def test_sparsify(dtype: torch.dtype, method: str, norm: str | None, density: float) -> None:
    tensor = (torch.randperm(120).float() - 60.25).view(10, 12).to(dtype)  # none twice
    rescale = None if norm is None else sparsifying.RescaleNorm(norm)
    kind = sparsifying.SparsificationMethod(method)
    arguments = {"density": density, "method": kind, "gamma": 0.1, "rescale_norm": rescale}
    expected = sparsifying.sparsify(tensor, **arguments)
    truth = sparsifying.sparsify(tensor.double(), **arguments)
    with nf.patch("mergekit", "exact"):
        got = sparsifying.sparsify(tensor, **arguments)
        assert same(got, expected) and torch.equal(got.signbit(), expected.signbit())
    with nf.patch("mergekit"):
        testing.assert_within_rule(sparsifying.sparsify(tensor, **arguments), expected, truth, 120)


def test_ties_of_magnitudes_go_to_the_smaller_index() -> None:
    tensor = torch.tensor([1.0, -2, 2, -1, 2, 1])
    kind = sparsifying.SparsificationMethod.magnitude
    for parity in ("exact", "accurate"):
        with nf.patch("mergekit", parity):
            got = sparsifying.sparsify(tensor, density=4 / 6, method=kind)
        assert got.tolist() == [1, -2, 2, 0, 2, 0]


def test_slerp_of_a_batch() -> None:
    module = importlib.import_module("mergekit.merge_methods.slerp")
    a, b = torch.randn(2, 4, 30)
    b[1], b[2], a[3] = 2 * a[1], -a[2], 0  # parallel, opposite, and no direction
    t = torch.tensor([0.25, 0.3, 0.5, 0.7])
    expected, truth = module.slerp(t, a, b), module.slerp(t.double(), a.double(), b.double())
    with nf.patch("mergekit") as patch:
        testing.assert_within_rule(module.slerp(t, a, b), expected, truth, terms=30)
    assert counts(patch, "slerp") == (1, {})


def test_undo_puts_everything_back() -> None:
    def originals() -> list[Any]:
        places = [_place(seam.where) for seam in HOST.seams()]
        return [place.get() for place in places]

    before = originals()
    patch = nf.patch("mergekit")
    assert all(new is not old for new, old in zip(originals(), before, strict=True))
    patch.undo()
    assert all(new is old for new, old in zip(originals(), before, strict=True))


def _place(where: str) -> Any:
    from neulig_fast.compat._seam import Place

    return Place(where)


# -- NeuLig, and the command ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def portland(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    experts = [torch.nn.Linear(6, 4) for _ in range(3)]
    heads = {name: nf.Head(torch.randn(3, 4)) for name in ("one", "two")}
    engine = nf.NeuLig(nf.ExpertPool(experts), heads)
    engine.calibration = {
        "one": torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64),
        "two": torch.tensor([0.0, 0.75, 0.25], dtype=torch.float64),
    }
    folder = tmp_path_factory.mktemp("portland")
    engine.save(folder)
    return str(folder)


def test_neulig_merges_by_merge_vectors(portland: str) -> None:
    tensors = family(5, 3, experts=2)
    stack = torch.stack(tensors).double()
    wanted = {
        "one": torch.tensor([0.5, 0.25, 0.25]).double(),
        "": torch.tensor([0.25, 0.5, 0.25]).double(),
    }
    with nf.patch("mergekit", "exact"):
        for task, vector in wanted.items():
            got = methods.merge_tensors(
                tensors, "neulig", parameters={"portland": portland, "task": task}
            )
            assert torch.allclose(got.double(), torch.tensordot(vector, stack, 1), atol=1e-6)
        got = methods.merge_tensors(tensors, "neulig", parameters={"weight": [1.0, 0.0, 2.0]})
        assert torch.allclose(got, tensors[0] + 2 * tensors[2], atol=1e-6)
    assert "neulig" not in registry._METHODS


@pytest.fixture(scope="module")
def matched(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[nn.Module], nf.Alignment]:
    """A file of an alignment of three networks, and what it is of."""
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(3)]
    found = nf.align(networks, balance=1.0)
    path = tmp_path_factory.mktemp("alignment") / "alignment.safetensors"
    found.save(path)
    return str(path), networks, found


def test_mudsc_merges_as_the_alignment_does(
    matched: tuple[str, list[nn.Module], nf.Alignment],
) -> None:
    path, networks, found = matched
    expected = found.merge()
    plain = networks[0].state_dict()["0.weight"] / 3 + sum(n[0].weight / 3 for n in networks[1:])
    assert not torch.allclose(expected["0.weight"], plain)
    states = {f"m{i}": n.state_dict() for i, n in enumerate(networks)}
    towers = {
        m: {**{f"visual.{k}": x for k, x in state.items()}, "0.weight": state["0.bias"]}
        for m, state in states.items()
    }
    with nf.patch("mergekit", "exact"):
        got = methods.merge_state_dicts(states, "mudsc", parameters={"alignment": path})
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[k], expected[k]) for k in expected)
        parameters = {"alignment": path, "prefix": "visual."}
        with pytest.warns(nf.NeuligFastWarning, match=r"0\.weight is averaged as it is"):
            got = methods.merge_state_dicts(towers, "mudsc", parameters=parameters)
        assert all(torch.equal(got[f"visual.{k}"], expected[k]) for k in expected)
        mean = sum(n[0].bias.double() for n in networks) / 3
        testing.assert_within_rule(got["0.weight"], mean.float(), mean)  # the name of another part
    assert "mudsc" not in registry._METHODS


def test_mudsc_says_what_is_wrong(
    matched: tuple[str, list[nn.Module], nf.Alignment], tmp_path: Path
) -> None:
    path, networks, _ = matched
    tensors = [n[0].weight.detach() for n in networks]

    def tried(
        tensors: list[Tensor], name: str | None, alignment: str = path, prefix: str = ""
    ) -> None:
        given = {"alignment": alignment, "prefix": prefix}
        with nf.patch("mergekit"):
            methods.merge_tensors(tensors, "mudsc", parameters=given, name=name)

    with pytest.raises(ValueError, match="the name of the tensor must be given"):
        tried(tensors, None)
    with pytest.raises(ValueError, match=r"got visual\.0\.weight: prefix must be 'visual\.'"):
        tried(tensors, "visual.0.weight")
    with pytest.raises(ValueError, match=r"needs 3 tensors of 0\.weight, got 2"):
        tried(tensors[:2], "0.weight")
    with pytest.raises(ValueError, match=r"node 0 uses 0\.weight, axis 0, entries 0 to 8, but"):
        tried([tensor[:7] for tensor in tensors], "0.weight")
    with pytest.raises(FileNotFoundError):
        tried(tensors, "0.weight", str(tmp_path / "none"))
    (tmp_path / "other").write_text("{}")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        tried(tensors, "0.weight", str(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"prefix must end with a dot, got 'visual'"):
        tried(tensors, "visual.0.weight", prefix="visual")
    with pytest.raises(ValueError, match=r"needs 3 tensors of text\.scale, got 2"):
        tried(tensors[:2], "text.scale", prefix="visual.")


@pytest.mark.parametrize(
    ("prefix", "start"), [("vision.", "visual."), ("model.", "model.visual."), ("visual.", "")]
)
def test_mudsc_says_what_looks_aligned_and_is_averaged_as_it_is(
    matched: tuple[str, list[nn.Module], nf.Alignment], tmp_path: Path, prefix: str, start: str
) -> None:
    """Once for all tensors that begin so, not for what has no aligned tensor's name."""
    path, networks, _ = matched
    alignment = shutil.copy(path, tmp_path / "alignment.safetensors")
    names = [*networks[0].state_dict(), "1.gain"]
    states = {
        f"m{i}": {f"{start}{name}": n.state_dict().get(name, n[2].bias) for name in names}
        for i, n in enumerate(networks)
    }
    parameters = {"alignment": str(alignment), "prefix": prefix}
    with nf.patch("mergekit"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = methods.merge_state_dicts(states, "mudsc", parameters=parameters)
    said = [str(warning.message) for warning in caught]
    assert said == [f"mudsc: {start}0.weight is averaged as it is; prefix is {prefix!r}"]
    for name, found in got.items():
        plain = sum(state[name].detach().double() for state in states.values()) / 3
        testing.assert_within_rule(found, plain.float(), plain)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "a weight for every model, or portland"),
        ({"weight": [1.0, 2.0, 3.0], "portland": "x"}, "a weight for every model, or portland"),
        ({"weight": [1.0, 2.0, 3.0], "task": "one"}, "task 'one' is given without portland"),
        ({"portland": True, "task": "ome"}, "got 'ome'; did you mean 'one'"),
    ],
)
def test_neulig_says_what_is_wrong(portland: str, parameters: dict[str, Any], message: str) -> None:
    given = {**parameters, **({"portland": portland} if parameters.get("portland") is True else {})}
    with nf.patch("mergekit"), pytest.raises(ValueError, match=message):
        methods.merge_tensors(family(4, experts=2), "neulig", parameters=given)
    with nf.patch("mergekit"), pytest.raises(ValueError, match="has 3 experts, got 4 models"):
        methods.merge_tensors(family(4, experts=3), "neulig", parameters={"portland": portland})


def test_the_command_runs_mergekits_under_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    import click

    seen = []

    @click.command()
    @click.argument("config")
    def main(config: str) -> None:
        seen.append((config, [patch.name for patch in nf.patch.status()]))

    script = types.SimpleNamespace(main=main)
    monkeypatch.setitem(sys.modules, "mergekit.scripts.run_yaml", script)
    monkeypatch.setattr(sys, "argv", ["nf-mergekit-yaml", "recipe.yml"])
    with pytest.raises(SystemExit) as end:
        mergekit_yaml.main()
    assert end.value.code == 0 and seen == [("recipe.yml", ["mergekit"])]
    assert not nf.patch.status()
