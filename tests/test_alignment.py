"""Alignment end to end: known answers, the published loop restated, and what may not happen."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from open_clip.transformer import VisionTransformer
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import neulig_fast as nf
from neulig_fast import alignment
from neulig_fast.alignment import Alignment, Node, Spec, Use
from neulig_fast.alignment.activations import ActivationMoments
from neulig_fast.alignment.networks import Networks
from neulig_fast.alignment.repair import reestimate_batchnorm, rescale

_H0 = [("0.weight", 0, "out"), ("0.bias", 0, "vec"), ("2.weight", 1, "in")]
_H1 = [("2.weight", 0, "out"), ("2.bias", 0, "vec"), ("4.weight", 1, "in")]
SPEC = Spec(
    [Node("h0", 24), Node("h1", 16)],
    [Use(t, a, n, r) for n, uses in (("h0", _H0), ("h1", _H1)) for t, a, r in uses],
)


def deep(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    widths = (8, 12, 12, 12, 12, 12, 5)
    layers = [nn.Linear(a, b, bias=False) for a, b in pairwise(widths)]
    return nn.Sequential(*layers).double()


def mlp(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5)
    return nn.Sequential(*layers).double()


def vit(seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    model = VisionTransformer(16, 8, 24, 2, 4, 4.0, output_dim=8).double().eval()
    for parameter in model.parameters():  # fresh biases are zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def batches(*shape: int, count: int = 3, seed: int = 9) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(32, *shape, generator=g, dtype=torch.float64) for _ in range(count)]


def gap(state: dict, model: nn.Module) -> float:
    return max(float((state[k] - v).abs().max()) for k, v in model.state_dict().items())


# -- known answers --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["colour", "seeded"])
@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_a_permuted_copy_of_an_mlp_is_found(balance: float, order: str) -> None:
    model = mlp(0)
    copy, match = alignment.random_permutation(model, SPEC, seed=3)
    found = nf.align([model, copy], SPEC, batches(8), balance, order=order)
    for node, planted in match.items():
        assert torch.equal(planted[found.order(1)[node]], torch.arange(len(planted)))
    assert found.value == pytest.approx(1, abs=1e-12)
    assert found.trace_after == 0 and found.trace_before > 1
    assert gap(found.apply(1), model) == 0
    assert gap(found.merge(), model) == 0


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_a_permuted_copy_of_a_vit_is_found(balance: float) -> None:
    model = vit(0)
    spec = alignment.spec_for(model)
    copy, _ = alignment.random_permutation(model, spec, seed=5)
    found = nf.align([model, copy], spec, batches(3, 16, 16, count=2), balance)
    assert gap(found.apply(1), model) == 0
    assert found.value == pytest.approx(1, abs=1e-12)


def test_noise_does_not_hide_a_planted_order() -> None:
    model = mlp(1)
    copy, match = alignment.random_permutation(model, SPEC, seed=4)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    found = nf.align([model, copy], SPEC, balance=1)
    for node, planted in match.items():
        assert torch.equal(planted[found.order(1)[node]], torch.arange(len(planted)))
    assert found.trace_after < found.trace_before / 10


def test_units_that_are_silent_on_the_data_are_like_nothing() -> None:
    model = mlp(2)
    with torch.no_grad():
        model[0].bias[:2] = -1e3
    copy, match = alignment.random_permutation(model, SPEC, seed=5)
    found = nf.align([model, copy], SPEC, batches(8), balance=0)
    right = match["h0"][found.order(1)["h0"]] == torch.arange(24)
    assert right[2:].all()
    assert found.values[-1]["h0"] == pytest.approx(22 / 24)
    both = nf.align([model, copy], SPEC, batches(8), balance=0.5)
    assert gap(both.apply(1), model) == 0  # weights tell the silent units apart


def test_each_of_three_networks_is_matched_to_the_first() -> None:
    model = mlp(3)
    copies = [alignment.random_permutation(model, SPEC, seed=s)[0] for s in (6, 7)]
    found = nf.align([model, *copies], SPEC, batches(8))
    assert [gap(found.apply(i), model) for i in range(3)] == [0, 0, 0]
    pool = found.pool()
    assert torch.equal(pool.params[0], pool.params[2])


def test_zip_of_a_network_with_itself_is_the_network() -> None:
    model = mlp(4)
    found = nf.align([model, model], SPEC, batches(8), match="zip")
    assert found.value == pytest.approx(1, abs=1e-12)
    assert gap(found.merge(), model) < 1e-15


# -- the published procedure, restated without any of the shortcuts -------------------------------


def restated(
    spec: Spec, a: dict, b: dict, data: list[Tensor], balance: float, seed: int
) -> dict[str, Tensor]:
    """Dense permutation matrices, the union's correlation, everything anew at every visit.

    Without ``data``, weights alone.
    """
    states = (a, b)
    current = {name: torch.eye(node.size).double() for name, node in spec.nodes.items()}

    def rows(state: dict, node: str, other: bool) -> Tensor:
        pieces = []
        for use in spec.uses_of(node):
            tensor = state[use.tensor]
            for beside in spec.uses_in(use.tensor):
                if beside.axis != use.axis and other:
                    matrix = current[beside.node]
                    tensor = (tensor.movedim(beside.axis, -1) @ matrix.T).movedim(-1, beside.axis)
            pieces.append(tensor.movedim(use.axis, 0).reshape(tensor.shape[use.axis], -1))
        return torch.cat(pieces, 1)

    def activations(state: dict, node: str) -> Tensor:
        x = torch.cat(data)
        h0 = torch.relu(x @ state["0.weight"].T + state["0.bias"])
        return (h0 if node == "h0" else torch.relu(h0 @ state["2.weight"].T + state["2.bias"])).T

    def matched(union: np.ndarray, n: int) -> tuple[Tensor, float]:
        block = union[:n, n:]
        at, order = linear_sum_assignment(block, maximize=True)
        return torch.eye(n).double()[order], block[at, order].mean()

    ca = dict.fromkeys(current, 0.0)
    for name, node in spec.nodes.items() if data else ():
        with np.errstate(invalid="ignore"):  # units that never fire
            union = np.corrcoef(torch.cat([activations(state, name) for state in states]))
        ca[name] = np.nan_to_num(union)
        current[name] = matched(ca[name], node.size)[0]
    best, best_value, stall = None, 0.0, 0
    g = torch.Generator().manual_seed(seed)
    while stall < 5:
        values = []
        for k in torch.randperm(len(current), generator=g).tolist():
            name = list(current)[k]
            n = spec.nodes[name].size
            cw = np.corrcoef(torch.cat([rows(a, name, False), rows(b, name, True)]))
            current[name], value = matched(balance * cw + (1 - balance) * ca[name], n)
            values.append(value)
        if best is not None and np.mean(values) <= best_value:
            stall, current = stall + 1, dict(best)
        else:
            best, best_value, stall = dict(current), np.mean(values), 0
    return {name: matrix.argmax(1) for name, matrix in best.items()}


@pytest.mark.parametrize("seed", range(4))
def test_unrelated_networks_are_matched_as_by_the_published_loop(seed: int) -> None:
    a, b, data = mlp(10 + seed), mlp(20 + seed), batches(8)
    expected = restated(SPEC, a.state_dict(), b.state_dict(), data, 0.5, seed)
    found = nf.align([a, b], SPEC, data, 0.5, seed=seed, order="seeded")
    for node, order in expected.items():
        assert torch.equal(found.order(1)[node], order)


@pytest.mark.parametrize("seed", range(6))
def test_sweeps_that_fall_back_to_the_best_go_on_as_published(seed: int) -> None:
    a, b = deep(30 + seed), deep(40 + seed)
    spec = alignment.spec_for(a)
    expected = restated(spec, a.state_dict(), b.state_dict(), [], 1.0, seed)
    found = nf.align([a, b], spec, balance=1, seed=seed, order="seeded")
    for node, order in expected.items():
        assert torch.equal(found.order(1)[node], order)


# -- properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_unrelated_vits_keep_their_function_and_one_order_of_heads(balance: float) -> None:
    a, b = vit(1), vit(2)
    spec, data = alignment.spec_for(a), batches(3, 16, 16, count=1)
    found = nf.align([a, b], spec, data, balance)
    aligned = vit(1)
    aligned.load_state_dict(found.apply(1))
    torch.testing.assert_close(aligned(data[0]), b(data[0]), rtol=1e-10, atol=1e-12)
    ties: dict[str, set] = {}
    for name, node in spec.nodes.items():
        if node.tie is not None:
            heads = found.order(1)[name].view(node.blocks, -1)[:, 0] // node.block_size
            ties.setdefault(node.tie, set()).add(tuple(heads.tolist()))
    assert len(ties) == 2 and all(len(orders) == 1 for orders in ties.values())
    assert found.trace_after < found.trace_before or balance == 0


def test_values_of_accepted_sweeps_grow() -> None:
    found = nf.align([mlp(5), mlp(6)], SPEC, balance=1, order="seeded")
    means = [sum(values.values()) / len(values) for values in found.values]
    best = np.maximum.accumulate(means)
    assert found.converged and found.value == best[-1]
    assert len(means) - 1 - int(np.argmax(means)) == 5  # patience


def test_weights_alone_do_not_look_at_the_data() -> None:
    a, b = mlp(7), mlp(8)
    without = nf.align([a, b], SPEC, balance=1)
    with_data = nf.align([a, b], SPEC, batches(8), balance=1)
    assert all(torch.equal(without.order(1)[n], with_data.order(1)[n]) for n in SPEC.nodes)


def test_a_common_permutation_of_both_networks_changes_nothing() -> None:
    a, b, data = mlp(9), mlp(11), batches(8)
    moved = [alignment.random_permutation(model, SPEC, seed=12)[0] for model in (a, b)]
    plain, other = (nf.align(pair, SPEC, data) for pair in ([a, b], moved))
    _, match = alignment.random_permutation(a, SPEC, seed=12)
    for node in SPEC.nodes:
        p = match[node]
        assert torch.equal(p[other.order(1)[node]], plain.order(1)[node][p])


def test_git_re_basin_makes_the_distance_smaller_in_every_sweep() -> None:
    a, b = mlp(13), mlp(14)
    found = nf.align([a, b], SPEC, balance=1, similarity="inner_product")
    sums = [sum(SPEC.nodes[n].size * v for n, v in values.items()) for values in found.values]
    assert sums == sorted(sums) and found.converged
    assert found.trace_after < found.trace_before


def test_streamed_moments_are_numpys_correlation() -> None:
    a, b = mlp(15), mlp(16)
    moments = ActivationMoments(Networks([a, b]), SPEC, [(0, 1)])
    data = batches(8, count=5)
    moments.collect(data)
    with torch.no_grad():
        x, y = (model[:4](torch.cat(data)).T.numpy() for model in (a, b))
    got = moments.similarity("h1")[0, 1].numpy()
    vary = np.ix_(x.std(1) > 0, y.std(1) > 0)
    expected = np.corrcoef(x, y)[:16, 16:]
    np.testing.assert_allclose(got[vary], expected[vary], atol=1e-12)
    assert (got[x.std(1) == 0] == 0).all()


def test_a_mean_of_a_thousand_deviations_keeps_its_variance() -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.Identity(), nn.Linear(12, 2))
    with torch.no_grad():
        model[0].bias += 1e3
    spec = Spec([Node("h", 12)], [Use("0.weight", 0, "h"), Use("2.weight", 1, "h", "in")])
    data = [batch.float() for batch in batches(6, count=4)]
    moments = ActivationMoments(Networks([model, model]), spec, [(0, 1)])
    moments.collect(data)
    with torch.no_grad():
        exact = model.double()[:1](torch.cat(data).double()).T.numpy()
    np.testing.assert_allclose(moments.similarity("h")[0, 1], np.corrcoef(exact), atol=2e-3)


def test_save_and_load(tmp_path) -> None:
    for match in ("align", "zip"):
        found = nf.align([mlp(17), mlp(18)], SPEC, batches(8), match=match)
        found.save(tmp_path / "found.safetensors")
        again = Alignment.load(tmp_path / "found.safetensors")
        experts = [mlp(17), mlp(18)]
        merged, expected = again.merge(experts), found.merge()
        assert all(torch.equal(merged[name], expected[name]) for name in expected)
        assert (again.value, again.values, again.names) == (found.value, found.values, found.names)
    with pytest.raises(ValueError, match="Alignment: needs 2 experts, got 0"):
        again.merge()
    (tmp_path / "found.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        Alignment.load(tmp_path / "found.safetensors")


def test_a_grid_of_balances_runs_the_data_once() -> None:
    class Counted(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    data = Counted(batches(8))
    aligner = alignment.Aligner([mlp(0), mlp(1)], SPEC, data)
    best, scores = aligner.choose_balance(lambda state: -float(state["0.weight"].norm()))
    assert data.passes == 1 and len(scores) == 9
    assert scores[best.balance] == max(scores.values())
    assert best.value == nf.align([mlp(0), mlp(1)], SPEC, data, best.balance).value


def test_likeness_is_the_mean_cosine_to_the_experts_mean_direction() -> None:
    data = [(x, None) for x in batches(8)]
    pixels = torch.cat([x for x, _ in data]).flatten(1).double().numpy()
    maps = [torch.randn(5, pixels.shape[1], dtype=torch.float64) for _ in range(3)]
    template = nn.Sequential(nn.Flatten(), nn.Linear(pixels.shape[1], 5, bias=False)).double()
    score = alignment.EnsembleLikeness([{"1.weight": w} for w in maps[:2]], template, data)

    def directions(weight: Tensor) -> np.ndarray:
        outputs = pixels @ weight.numpy().T
        return outputs / np.linalg.norm(outputs, axis=1, keepdims=True)

    mean = directions(maps[0]) + directions(maps[1])
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    for weight in (maps[2], maps[0]):
        expected = (directions(weight) * mean).sum(1).mean()
        assert score({"1.weight": weight}) == pytest.approx(expected, abs=1e-12)
        assert score({"1.weight": -3 * weight}) == pytest.approx(-expected, abs=1e-12)


def test_likeness_needs_images_that_can_be_read_again() -> None:
    template = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="got an iterator"):
        alignment.EnsembleLikeness([template.state_dict()], template, iter([torch.ones(1, 2)]))
    with pytest.raises(ValueError, match="at least one batch of images"):
        alignment.EnsembleLikeness([template.state_dict()], template, [torch.ones(0, 2)])


def test_an_interrupt_returns_the_best_so_far(monkeypatch) -> None:
    calls = 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == 5:  # two nodes by their activations, one sweep, and into the next
            raise KeyboardInterrupt
        return solve(*arguments)

    solve = alignment.matchings.match_nodes
    monkeypatch.setattr(alignment.matchings, "match_nodes", interrupted)
    found = nf.align([mlp(10), mlp(20)], SPEC, batches(8), order="seeded")
    assert found.interrupted and not found.converged and len(found.values) == 2
    once = nf.align([mlp(10), mlp(20)], SPEC, batches(8), order="seeded", sweeps=1)
    assert all(torch.equal(found.order(1)[n], once.order(1)[n]) for n in SPEC.nodes)


# -- after merging --------------------------------------------------------------------------------


def test_batchnorm_is_measured_on_the_merged_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    data = batches(2, 6, 6)
    state = reestimate_batchnorm(net.state_dict(), net, data)
    outputs = torch.cat([net[0](batch) for batch in data])
    expected = outputs.mean((0, 2, 3))
    torch.testing.assert_close(state["1.running_mean"], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(net.state_dict()["1.running_mean"], torch.zeros(4).double())


def test_rescale_leaves_an_expert_as_it_is_and_repairs_a_shrunken_one() -> None:
    model, data = mlp(19), batches(8, count=1)
    same = rescale(model.state_dict(), [model, model], model, SPEC, data)
    assert gap(same, model) < 1e-12
    shrunk = {name: tensor * 0.3 for name, tensor in model.state_dict().items()}
    shrunk["4.weight"], shrunk["4.bias"] = (model.state_dict()[n] for n in ("4.weight", "4.bias"))
    assert gap(rescale(shrunk, [model], model, SPEC, data), model) < 1e-10


def test_rescale_says_what_it_lacks() -> None:
    model = mlp(0)
    state, data = model.state_dict(), batches(8)
    for given, said in (([], "at least one batch"), (iter(data), "got an iterator: give a list")):
        with pytest.raises(ValueError, match=said):
            rescale(state, [model], model, SPEC, given)
    with pytest.raises(ValueError, match="needs at least one expert, got none"):
        rescale(state, [], model, SPEC, data)
    plain = nn.Sequential(nn.Linear(8, 6, bias=False), nn.Linear(6, 2)).double()
    spec = alignment.spec_for(plain)
    with pytest.raises(ValueError, match="no layer that makes units has a bias"):
        rescale(plain.state_dict(), [plain], plain, spec, data)


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "balance=0.5 asks for activations: pass data="),
        ({"balance": 1.5}, "balance must be 0 to 1, got 1.5"),
        ({"match": "zipp", "balance": 1}, "match must be one of align, zip, got 'zipp'; did you"),
        ({"similarity": "cosine", "balance": 1}, "similarity must be one of correlation, inner_p"),
        ({"similarity": "inner_product", "data": [0]}, "goes with balance=1 only"),
        ({"order": "random", "balance": 1}, "order must be one of colour, seeded, got 'random'"),
        ({"sweeps": 0, "balance": 1}, "sweeps must be 1 or more, got 0"),
        ({"data": []}, "data must yield at least one batch of images, got none"),
        ({"data": [["a"]]}, "data must yield tensors of images, got str"),
        ({"data": [torch.full((4, 8), torch.nan).double()]}, "24 of 24 units of node h0 have"),
    ],
)
def test_settings_that_cannot_be(settings: dict, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        nf.align([mlp(0), mlp(1)], SPEC, **settings)


def test_experts_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"node h0 uses 0.weight, axis 0, entries 0 to 24, but"):
        nf.align([nn.Sequential(nn.Linear(8, 4))] * 2, SPEC, balance=1)
    with pytest.raises(ValueError, match=r"node h1 uses 4.weight, which is not there"):
        state = {k: v for k, v in mlp(0).state_dict().items() if k != "4.weight"}
        nf.align([state, state], SPEC, balance=1)
    wide = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16)).double()
    with pytest.raises(ValueError, match=r"expert1: 0.weight has shape \(32, 8\), expert0 has"):
        nf.align([mlp(0)[:3], wide], SPEC, balance=1)
    with pytest.raises(ValueError, match="state dicts alone do not tell their architecture"):
        nf.align([mlp(0).state_dict()] * 2, balance=1)
    with pytest.raises(ValueError, match="but no module to run on it; pass template="):
        nf.align([mlp(0).state_dict()] * 2, SPEC, batches(8))
    with pytest.raises(TypeError, match="experts must be a list of experts, got a single one"):
        nf.align(mlp(0), SPEC, balance=1)
