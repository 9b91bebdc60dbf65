"""What alignment is given and where it runs: hostile data, specs, files and surroundings."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

import neulig_fast as nf
from neulig_fast import alignment
from neulig_fast.alignment import Alignment, Node, Spec, Use
from neulig_fast.alignment.repair import reestimate_batchnorm, rescale

USES = [
    Use("0.weight", 0, "h0"),
    Use("0.bias", 0, "h0", "vec"),
    Use("2.weight", 1, "h0", "in"),
    Use("2.weight", 0, "h1"),
    Use("2.bias", 0, "h1", "vec"),
    Use("4.weight", 1, "h1", "in"),
]
NODES = [Node("h0", 24), Node("h1", 16)]
SPEC = Spec(NODES, USES)


def mlp(seed: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5)
    return nn.Sequential(*layers).to(dtype)


def transformer(seed: int) -> nn.Sequential:
    """Every module in which torch has a fast path, and a dropout."""
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.5, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(6, 8), encoder, nn.Dropout(0.5), nn.Linear(8, 3))


def cnn(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def batches(*shape: int, count: int = 3, seed: int = 9, dtype=torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(32, *shape, generator=g, dtype=torch.float64).to(dtype) for _ in range(count)
    ]


def orders(found: Alignment) -> dict[str, Tensor]:
    return {name: found.order(1)[name] for name in found.spec.nodes}


def same(one: Alignment, other: Alignment) -> bool:
    mine, theirs = orders(one), orders(other)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


KINDS = {
    "mlp": (mlp, (8,), torch.float64),
    "mlp32": (lambda seed: mlp(seed, torch.float32), (8,), torch.float32),
    "transformer": (transformer, (5, 6), torch.float32),
    "cnn": (cnn, (2, 8, 8), torch.float32),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def pair(kind: str) -> tuple[list[nn.Module], list[Tensor]]:
    build, shape, dtype = KINDS[kind]
    return [build(1), build(2)], batches(*shape, dtype=dtype)


# -- how many experts -----------------------------------------------------------------------------


@pytest.mark.parametrize("match", ["align", "zip"])
@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_one_expert_alone_is_as_it_is(balance, match):
    model = mlp(0)
    found = nf.align([model], SPEC, batches(8), balance, match=match)
    assert (found.num_networks, found.converged, found.trace_before) == (1, True, 0)
    merged = found.merge()
    assert all(torch.equal(merged[name], t) for name, t in model.state_dict().items())
    if match == "align":
        assert all(torch.equal(found.apply(0)[n], t) for n, t in model.state_dict().items())


def test_three_experts_are_zipped_into_one_of_their_size():
    models = [mlp(seed) for seed in range(3)]
    found = nf.align(models, SPEC, batches(8), match="zip")
    for name, zipped in found.matchings.items():
        n = SPEC.nodes[name].size
        assert zipped.merged.shape == (3, n) and zipped.size == n == len(zipped.counts)
        assert int(zipped.counts.min()) >= 1 and len(zipped.accepted) == 2 * n
        within = [n - len(set(row.tolist())) for row in zipped.merged]
        assert within[0] <= 2 * n // 3  # its budget
    merged = found.merge()
    h0 = found.matchings["h0"]
    u = (h0.merged[..., None] == torch.arange(24)).double()  # (N, n, size), from the definitions
    m = 3 * u / u.sum((0, 1))
    states = [model.state_dict() for model in models]
    bias = sum(m[i].T @ state["0.bias"] for i, state in enumerate(states)) / 3
    torch.testing.assert_close(merged["0.bias"], bias)
    h1 = (found.matchings["h1"].merged[..., None] == torch.arange(16)).double()
    out = 3 * h1 / h1.sum((0, 1))
    weight = sum(out[i].T @ state["2.weight"] @ u[i] for i, state in enumerate(states)) / 3
    torch.testing.assert_close(merged["2.weight"], weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_the_mean_of_reordered_copies_is_the_network_to_the_bit(count, dtype):
    model = mlp(0, dtype)
    copies = [alignment.random_permutation(model, SPEC, seed)[0] for seed in range(1, count)]
    merged = nf.align([model, *copies], SPEC, balance=1).merge()
    assert all(torch.equal(merged[name], t) for name, t in model.state_dict().items())


# -- devices --------------------------------------------------------------------------------------


def elsewhere(model: nn.Module) -> dict[str, Tensor]:
    """A state dict on a GPU that need not be there, of which nothing can be read."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return {n: torch.empty(t.shape, device="cuda:1") for n, t in model.state_dict().items()}


class NoFloat64(TorchFunctionMode):
    """What MPS says."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.empty and (kwargs or {}).get("dtype") == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return func(*args, **(kwargs or {}))


def test_experts_on_different_devices_are_named_with_theirs():
    split, model = mlp(2, torch.float32), mlp(0, torch.float32)
    split[2].to("meta")
    experts = [model, elsewhere(mlp(1, torch.float32)), split]
    places = "expert0 on cpu, expert1 on cuda:1, expert2 on cpu and meta$"
    with pytest.raises(ValueError, match=rf"^align: all must be on one device, got {places}"):
        nf.align(experts, SPEC, balance=1, template=model)
    data, state = batches(8, dtype=torch.float32), model.state_dict()
    places = "state on cpu, experts.0. on cpu, experts.1. on cuda:1, experts.2. on cpu and meta$"
    with pytest.raises(ValueError, match=rf"^rescale: all must be on one device, got {places}"):
        rescale(state, experts, model, SPEC, data)
    with pytest.raises(ValueError, match=r"^reestimate_batchnorm: all .* state on cpu and meta$"):
        reestimate_batchnorm(split.state_dict(), model, data)


def test_devices_without_values_or_float64_are_refused():
    experts = [mlp(0), mlp(1)]
    with NoFloat64(), pytest.raises(ValueError, match=r"^align: cpu has no float64, in which"):
        nf.align(experts, SPEC, balance=1)
    empty = [expert.to("meta") for expert in experts]
    with pytest.raises(ValueError, match=r"^align: meta tensors hold no values$"):
        nf.align(empty, SPEC, balance=1)
    with pytest.raises(ValueError, match=r"^verify: 6 problems(.|\n)*4\.bias is on the meta"):
        alignment.verify(empty[0], SPEC)


def test_a_template_may_be_on_any_device():
    states = [mlp(0).state_dict(), mlp(1).state_dict()]
    found = nf.align(states, Spec(NODES, USES), batches(8), template=mlp(0))
    empty = mlp(0).to("meta")
    assert same(nf.align(states, Spec(NODES, USES), batches(8), template=empty), found)
    assert nf.align(states, None, batches(8), template=empty).value == found.value


# -- surroundings that do not matter --------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("match", ["align", "zip"])
def test_inference_mode_changes_nothing(kind, match):
    experts, data = pair(kind)
    plain = nf.align(experts, data=data, match=match)
    with torch.inference_mode():
        inside = nf.align(experts, data=data, match=match)
        made, _ = pair(kind)  # tensors that never were outside
    outside = nf.align(made, data=data, match=match)
    for found in (inside, outside):
        assert found.values == plain.values


@every_kind
def test_autocast_changes_nothing(kind):
    experts, data = pair(kind)
    plain = nf.align(experts, data=data)
    with torch.autocast("cpu", torch.bfloat16):
        found = nf.align(experts, data=data)
        weights = nf.align(experts, balance=1)
    assert found.values == plain.values
    assert weights.values == nf.align(experts, balance=1).values


@pytest.mark.parametrize("match", ["align", "zip"])
def test_nothing_goes_to_the_default_device(match):
    experts, data = pair("transformer")
    plain = nf.align(experts, data=data, match=match)
    with torch.device("meta"):
        found = nf.align(experts, data=data, match=match)
        merged = found.merge()
        alignment.verify(experts[0], found.spec)
        moved, _ = alignment.random_permutation(experts[0], found.spec, 0)
        found.spec.identity()
    assert found.values == plain.values
    assert all(torch.equal(merged[name], t) for name, t in plain.merge().items())
    assert not any(tensor.is_meta for tensor in moved.state_dict().values())


@pytest.mark.parametrize("fails", [False, True])
def test_modes_flags_and_random_state_are_left_alone(fails):
    experts, data = pair("transformer")
    for expert in experts:
        expert.train()
    experts[0][1].layers[0].eval()
    experts[0][0].weight.requires_grad_(False)
    if fails:
        data = [*data, torch.full((4, 5, 6), torch.nan)]

    def state():
        modes = [m.training for expert in experts for m in expert.modules()]
        wanted = [p.requires_grad for expert in experts for p in expert.parameters()]
        values = [t.clone() for expert in experts for t in expert.state_dict().values()]
        flags = (
            torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled(),
            torch.get_num_threads(), torch.get_default_dtype(),
        )  # fmt: skip
        return modes, wanted, flags, torch.get_rng_state().tolist(), [v.tolist() for v in values]

    before = state()
    if fails:
        with pytest.raises(ValueError, match="NaN or infinite"):
            nf.align(experts, data=data)
        with pytest.raises(ValueError, match="NaN or infinite"):
            spec = alignment.spec_for(experts[0])
            rescale(experts[0].state_dict(), experts, experts[0], spec, data)
    else:
        found = nf.align(experts, data=data)
        aligned = [found.apply(i) for i in range(2)]
        rescale(found.merge(), aligned, experts[0], found.spec, data)
    assert state() == before
    assert all(p.grad is None for expert in experts for p in expert.parameters())


def test_hooks_of_the_user_run_and_stay():
    experts, data = pair("mlp")
    calls = []
    plain = nf.align(experts, SPEC, data)
    handle = experts[0][2].register_forward_hook(lambda *args: calls.append(args[2].shape))
    found = nf.align(experts, SPEC, data)
    assert calls and same(found, plain)
    assert handle.id in experts[0][2]._forward_hooks


def test_shared_and_strided_tensors_are_as_their_copies():
    a, b = mlp(1), mlp(2)
    plain = nf.align([a, b], SPEC, batches(8))
    shared = dict(a.state_dict())
    shared["4.bias"] = b.state_dict()["4.bias"]
    strided = {
        name: torch.stack([t, t], -1)[..., 1] if t.ndim == 1 else t.t().contiguous().t()
        for name, t in b.state_dict().items()
    }
    found = nf.align([shared, strided], SPEC, batches(8), template=a)
    assert same(found, plain)
    wide = torch.randn(32, 16, dtype=torch.float64)
    wide[:, ::2] = batches(8)[0]
    one = nf.align([a, b], SPEC, batches(8, count=1))
    assert same(nf.align([a, b], SPEC, [wide[:, ::2]]), one)


def test_tied_weights_stay_tied():
    def tied(seed):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9))
        net.append(nn.Linear(9, 2))
        net[4].weight = net[2].weight
        return net

    one, two = tied(0), tied(1)
    found = nf.align([one, two], data=batches(6, dtype=torch.float32))
    state = found.apply(1)
    assert torch.equal(state["2.weight"], state["4.weight"])
    again = tied(2)
    again.load_state_dict(state)
    x = torch.randn(7, 6)
    torch.testing.assert_close(again(x), two(x))


def test_a_compiled_expert_is_aligned_as_it_is_uncompiled():
    experts, data = pair("mlp32")
    plain = nf.align(experts, data=data)
    for expert in experts:
        expert.compile(backend="eager")
    assert same(nf.align(experts, data=data), plain)


# -- data -----------------------------------------------------------------------------------------


class Yields:
    """A loader without a length."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(self.data)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_batches_that_are_empty_count_for_nothing(kind):
    experts, data = pair(kind)
    plain = nf.align(experts, data=data)
    found = nf.align(experts, data=Yields([data[0][:0], *data, data[0][:0]]))
    assert found.values == plain.values
    with pytest.raises(ValueError, match="align: data must yield at least one batch of images"):
        nf.align(experts, data=[data[0][:0]])


@pytest.mark.parametrize(
    "data, said",
    [
        (torch.randn(40, 8), r"data must be an iterable of batches, got one tensor \(40, 8\)"),
        ([{"images": torch.randn(4, 8)}], "data must yield tensors of images, .*got dict"),
        ([()], r"data must yield tensors of images, .*got tuple"),
        ([None], "data must yield tensors of images, .*got NoneType"),
        (["images"], "data must yield tensors of images, .*got str"),
        ([torch.tensor(1.0)], r"data must yield tensors of images, .*got a tensor \(\)"),
        (7, "data must be an iterable of batches, got int"),
    ],
)
def test_data_that_is_none_is_named(data, said):
    experts, spec = [mlp(0), mlp(1)], SPEC
    with pytest.raises(TypeError, match=f"^align: {said}"):
        nf.align(experts, spec, data)
    with pytest.raises(TypeError, match=f"^rescale: {said}"):
        rescale(experts[0].state_dict(), experts, experts[0], spec, data)
    net = cnn(0)
    with pytest.raises(TypeError, match=f"^reestimate_batchnorm: {said}"):
        reestimate_batchnorm(net.state_dict(), net, data)


def test_all_nodes_that_are_not_finite_are_named():
    a, b = mlp(0), mlp(1)
    data = batches(8)
    data[1][3, 2] = torch.inf
    with pytest.raises(ValueError, match=r"^align: 4 problems") as caught:
        nf.align([a, b], SPEC, data)
    for network in ("expert0", "expert1"):
        for node, tensor in (("h0", "2.weight"), ("h1", "4.weight")):
            said = rf"units of node {node} have activations that are NaN or infinite in {network}"
            assert re.search(rf"{said}, at {tensor}", str(caught.value))


# -- specifications -------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", [0.5, 1.0])
@pytest.mark.parametrize("gone", range(len(USES)))
def test_a_spec_that_misses_an_axis_is_refused(gone, balance):
    broken = Spec(NODES, [use for k, use in enumerate(USES) if k != gone])
    use = USES[gone]
    with pytest.raises(ValueError) as caught:
        nf.align([mlp(0), mlp(1)], broken, batches(8), balance)
    said = rf"node {use.node} changes the outputs .*{re.escape(use.tensor)} axis {use.axis}"
    assert re.search(said, str(caught.value)), caught.value


def test_a_spec_is_judged_once(monkeypatch):
    calls = []
    monkeypatch.setattr(alignment.aligner, "verify", lambda *args: calls.append(args))
    experts = [mlp(0), mlp(1)]
    nf.align(experts, alignment.spec_for(experts[0]), balance=1)
    assert not calls
    nf.align(experts, Spec(NODES, USES), balance=1)
    assert len(calls) == 1
    states = [expert.state_dict() for expert in experts]
    nf.align(states, Spec(NODES, USES), balance=1)  # no module to run
    assert len(calls) == 1


def test_a_spec_that_no_inputs_can_be_made_up_for_is_taken_as_it_is():
    class Fussy(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            if len(x) != 32:
                raise RuntimeError("batches of 32")
            return self.down(self.up(x).relu())

    uses = [("up.weight", 0, "out"), ("up.bias", 0, "vec"), ("down.weight", 1, "in")]
    spec = Spec([Node("h", 6)], [Use(t, a, "h", r) for t, a, r in uses])
    torch.manual_seed(0)
    experts = [Fussy(), Fussy()]
    assert nf.align(experts, spec, batches(4, dtype=torch.float32)).trace_after > 0


def test_nodes_that_nothing_tells_apart_are_named():
    stat = Use("4.bias", 0, "counted", "stat")
    spec = Spec([*NODES, Node("ghost", 3), Node("counted", 5)], [*USES, stat])
    with pytest.raises(ValueError, match=r"^align: 2 problems") as caught:
        nf.align([mlp(0), mlp(1)], spec, balance=1)
    for name in ("ghost", "counted"):
        assert f"node {name} has no weight, bias or gain to compare" in str(caught.value)


def test_numbers_of_a_spec_that_cannot_be_are_named():
    nodes = [Node("a", 4, 0, shared_inner=True), Node("b", 4.0), Node("c", True), Node("d", 4)]
    uses = [Use("a.weight", 0, "a", inner=True), Use("b.weight", 0, "b"), Use("c.weight", 0.0, "d")]
    with pytest.raises(ValueError, match=r"^Spec: 4 problems") as caught:
        Spec(nodes, uses)
    for said in (
        "node a: 4 units cannot make 0 equal blocks",
        "node b: size and blocks must be whole numbers",
        "node c: size and blocks must be whole numbers",
        "c.weight, axis 0.0, of node d: axis, start and repeat must be whole numbers",
    ):
        assert said in str(caught.value)


class Mixes(nn.Module):
    """Takes (B, T, C) alone, though its first layer would take (B, C) too."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.first(x).transpose(1, 2).relu().transpose(1, 2))


def test_inputs_are_made_up_whatever_a_model_says_of_others():
    assert list(alignment.spec_for(Mixes()).nodes) == ["first"]
    fussy = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    alignment.verify(fussy, alignment.spec_for(fussy))


def test_an_output_that_is_no_number_tells_nothing():
    class TwoOutputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            y = self.last(self.first(x).relu())
            return y, (y - y.abs().amax() - 1).log()

    model = TwoOutputs()
    uses = [Use("first.weight", 0, "h"), Use("first.bias", 0, "h"), Use("last.weight", 1, "h")]
    with pytest.raises(ValueError, match="largest output is nan, which tells nothing"):
        alignment.verify(model, Spec([Node("h", 6)], uses))


# -- balances -------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(3))
def test_a_score_that_is_no_number_never_wins(place):
    aligner = alignment.Aligner([mlp(0), mlp(1)], SPEC, batches(8))
    given = [1.0, 3.0, 2.0]
    given[place] = math.nan
    scores = iter(given)
    best, found = aligner.choose_balance(lambda state: next(scores), (0.2, 0.5, 0.8))
    assert best.balance == (0.2, 0.5, 0.8)[1 if place != 1 else 2]
    assert math.isnan(found[(0.2, 0.5, 0.8)[place]])


def test_a_grid_is_checked_before_anything_is_run():
    seen = []
    aligner = alignment.Aligner([mlp(0), mlp(1)], SPEC, batches(8))
    with pytest.raises(ValueError, match=r"^align: 2 problems") as caught:
        aligner.choose_balance(lambda state: seen.append(state) or 0.0, iter([0.5, 2.0, -1.0]))
    assert "got 2.0" in str(caught.value) and "got -1.0" in str(caught.value) and not seen
    with pytest.raises(ValueError, match="grid must name at least one balance, got none"):
        aligner.choose_balance(lambda state: 0.0, iter([]))


# -- what was found -------------------------------------------------------------------------------


def test_orders_are_of_experts_that_there_are():
    found = nf.align([mlp(0), mlp(1)], SPEC, balance=1)
    assert torch.equal(found.order(-1)["h0"], found.order(1)["h0"])
    for i in (2, -3):
        with pytest.raises(IndexError, match=f"^Alignment: expert must be -2 to 1, got {i}"):
            found.apply(i)
    zipped = nf.align([mlp(0), mlp(1)], SPEC, balance=1, match="zip")
    for call in (zipped.order, zipped.apply):
        with pytest.raises(ValueError, match="a zip joins units and gives no expert an order"):
            call(1)
    with pytest.raises(ValueError, match="needs 2 experts, got 1"):
        found.pool([mlp(0)])


def test_tensors_of_a_merge_must_be_of_one_form():
    found = nf.align([mlp(0), mlp(1)], SPEC, balance=1)
    weight = mlp(0)[0].weight
    shapes, kinds = "0.weight must have one shape", "0.weight must have one dtype and device"
    for other, said in [
        (weight.float(), f"{kinds}, got torch.float32 on cpu, torch.float64 on cpu"),
        (weight.to("meta"), f"{kinds}, got torch.float64 on cpu, torch.float64 on meta"),
        (weight[1:], rf"{shapes}, got \(23, 8\), \(24, 8\)"),
        (weight[1:].half(), rf"2 problems\n  - {shapes}, .*\n  - {kinds}, got torch.float16 on"),
    ]:
        with pytest.raises(ValueError, match=f"^Alignment: {said}"):
            found.merge_tensor("0.weight", [weight, other])
    with pytest.raises(ValueError, match="free must have one dtype and device"):
        found.merge_tensor("free", [weight, weight.float()])
    with pytest.raises(ValueError, match=r"needs 2 tensors of 0\.weight, got 0"):
        found.merge_tensor("0.weight", [])


@pytest.mark.parametrize("match", ["align", "zip"])
def test_experts_of_a_merge_are_checked_as_any(match):
    experts = [mlp(0), mlp(1)]
    found = nf.align(experts, SPEC, balance=1, match=match)
    states = [dict(expert.state_dict()) for expert in experts]
    states[1]["4.bias"] = states[1]["4.bias"][:1]  # would broadcast
    del states[1]["0.bias"]
    states[0]["4.weight"] = states[0]["4.weight"] / 0
    with pytest.raises(ValueError, match=r"^Alignment: 3 problems") as caught:
        found.merge(states)
    assert "expert1 lacks 0.bias" in str(caught.value)
    assert "4.bias has shape (1,)" in str(caught.value) and "infinite" in str(caught.value)


# -- files ----------------------------------------------------------------------------------------


def saved(path, match: str):
    """A file of an alignment, as tensors and its description."""
    nf.align([mlp(0), mlp(1)], SPEC, batches(8), match=match).save(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, file.metadata(), json.loads(file.metadata()["alignment"])


def tear(name, value):
    return lambda tensors, content: tensors.update({name: value(tensors[name])})


def write(name, value):
    return lambda tensors, content: content.update({name: value})


def lose(name):
    return lambda tensors, content: tensors.pop(name)


def forget(name):
    return lambda tensors, content: content.pop(name)


def at(value, index):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


DAMAGE = {
    "a unit twice": (
        "align", tear("order/h0", lambda t: t[:, [0, *range(23)]]), "0: .*h0: its order is no perm",
    ),
    "out of range": ("align", tear("order/h0", at(99, (1, 4))), "expert1: .*h0: its order is no p"),
    "reference moved": (
        "align", tear("order/h1", lambda t: t.flip(0)), "h1: the first expert's order must be 0",
    ),
    "floats": ("align", tear("order/h0", lambda t: t.float()), "order of node h0 .*float32"),
    "fewer": ("align", tear("order/h0", lambda t: t[:1]), r"h0 must be \(2, 24\) .*got \(1, 24\)"),
    "no order": ("align", lose("order/h1"), "order of node h1 is missing"),
    "no distances": ("align", lose("distances_before"), "distances_before is missing"),
    "odd distances": (
        "align", tear("distances_before", lambda t: t[0]), r"distances_before must be \(2, 2\)",
    ),
    "odd aligned distances": (
        "align", tear("distances_after", lambda t: t.int()), r"distances_after must be \(2, 2\)",
    ),
    "no such kind": ("align", write("match", "alien"), "match must be one of align, zip, got 'al"),
    "names": ("align", write("names", "ab"), "names must be a list of different names, got 'ab'"),
    "names twice": ("align", write("names", ["a", "a"]), "names must be a list of different names"),
    "value": ("align", write("value", "high"), "value must be a number, got 'high'"),
    "balance": ("align", write("balance", None), "balance must be a number, got None"),
    "values": ("align", write("values", [1.0]), "values must be a list of numbers by node"),
    "converged": ("align", write("converged", "no"), "converged must be true or false, got 'no'"),
    "no value": ("align", forget("value"), "damaged description of an alignment .*value"),
    "no node": ("align", write("nodes", []), "(?s)damaged description .*no such node"),
    "a list": ("align", write("uses", [[]]), "damaged description of an alignment"),
    "a broken number": (
        "zip", lambda t, c: c["nodes"][0].update(size=24.0), "damaged .*node h0: size and blocks",
    ),
    "a broken axis": (
        "align", lambda t, c: c["uses"][0].update(axis="0"), "damaged .*0.weight.*whole numbers",
    ),
    "merged": ("zip", tear("merged/h0", at(24, (0, 0))), r"merged of node h0 must be 0 \.\. 23"),
    "negative": ("zip", tear("merged/h0", at(-1, (0, 0))), r"merged of node h0 must be 0 \.\. 23"),
    "float merged": ("zip", tear("merged/h0", lambda t: t.double()), "merged of node h0 .*float64"),
    "not all merged": (
        "zip", tear("merged/h0", lambda t: t.clamp(max=20)), "of node h0 .*units in all of them",
    ),
    "accepted": ("zip", lose("accepted/h1"), "accepted of node h1 is missing"),
    "odd accepted": ("zip", tear("accepted/h1", lambda t: t[:, None]), "accepted of node h1 must"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_refused_when_it_is_read(name, tmp_path):
    match, damage, said = DAMAGE[name]
    path = tmp_path / "found.safetensors"
    tensors, metadata, content = saved(path, match)
    damage(tensors, content)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(tensors, path, {**metadata, "alignment": json.dumps(content)})
    with pytest.raises(ValueError, match=said) as caught:
        Alignment.load(path)
    assert str(caught.value).startswith(str(path))


def test_files_of_something_else_are_refused(tmp_path):
    path = tmp_path / "found.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(
        ValueError, match=r"must be a file of format neulig_fast\.alignment\.1, got no"
    ):
        Alignment.load(path)
    tensors, metadata, _ = saved(path, "align")
    save_file(tensors, path, {**metadata, "alignment": "[" * 100_000})
    with pytest.raises(ValueError, match="damaged description of an alignment"):
        Alignment.load(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        Alignment.load(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="no such file"):
        Alignment.load(tmp_path)


# -- repair ---------------------------------------------------------------------------------------


def test_images_are_taken_in_the_type_of_the_state():
    net = cnn(0).double()
    data = batches(2, 8, 8, dtype=torch.float32)
    state = reestimate_batchnorm(net.state_dict(), net, [data[0][:0], *data])
    expected = torch.cat([net[0](batch.double()) for batch in data]).mean((0, 2, 3))
    torch.testing.assert_close(state["1.running_mean"], expected, rtol=1e-12, atol=1e-12)


def test_words_are_left_whole_by_a_repair():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    spec = alignment.spec_for(net)
    data = [torch.randint(11, (32, 5), generator=torch.Generator().manual_seed(1))]
    shrunk = {name: t * 0.5 if name[0] == "1" else t for name, t in net.state_dict().items()}
    state = rescale(shrunk, [net], net, spec, data)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(state[name], tensor)


class Columns(nn.Module):
    """Weights (in, out), as some libraries have them."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(6, 6))
        self.bias = nn.Parameter(torch.randn(6))
        self.down = nn.Linear(6, 2)

    def forward(self, x):
        return self.down(torch.addmm(self.bias, x, self.up).tanh())


def test_weights_that_make_units_along_columns_are_rescaled_along_columns():
    torch.manual_seed(0)
    net = Columns().double()
    uses = [("up", 1, "out"), ("bias", 0, "vec"), ("down.weight", 1, "in")]
    spec = Spec([Node("h", 6)], [Use(t, a, "h", r) for t, a, r in uses])
    alignment.verify(net, spec)
    state = {name: t.clone() for name, t in net.state_dict().items()}
    state["up"] *= torch.linspace(0.3, 0.8, 6).double()
    state["bias"] -= 1
    repaired = rescale(state, [net], net, spec, batches(6, count=1))
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(repaired[name], tensor)


class Patches(nn.Module):
    """Linear layers on tokens that are no rows in memory: torch adds their bias afterwards."""

    def __init__(self):
        super().__init__()
        self.patch, self.up = nn.Conv2d(2, 6, 2, 2), nn.Linear(6, 8)
        self.attend, self.down = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x):
        x = self.up(self.patch(x).flatten(2).transpose(1, 2))
        return self.down(x + self.attend(x, x, x, need_weights=False)[0])


def test_biases_that_are_added_apart_are_rescaled_too():
    torch.manual_seed(0)
    net, data = Patches().double(), batches(2, 8, 8, count=1)
    nn.init.normal_(net.attend.in_proj_bias)
    spec = alignment.spec_for(net, data[0])
    shrunk = {name: t * 0.4 for name, t in net.state_dict().items()}
    for name in ("down.weight", "down.bias"):
        shrunk[name] = net.state_dict()[name]
    repaired = rescale(shrunk, [net], net, spec, data)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(repaired[name], tensor, msg=name)


class Twice(nn.Module):
    """One inner layer, or its weight or bias alone, in two places."""

    def __init__(self, shared: str):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.down = nn.Linear(6, 2)
        self.again = shared == "layer"
        if shared == "weight":
            self.two.weight = self.one.weight
        elif shared == "bias":
            self.two.bias = self.one.bias

    def forward(self, x):
        x = self.one(x).relu()
        return self.down((self.one if self.again else self.two)(x).relu())


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(
    ("shared", "said"),
    [
        ("layer", ["one.weight runs 6 times in 3 batches, and every run would need its own scale"]),
        ("weight", ["one.weight and two.weight are one tensor, which would need a scale for each"]),
        ("bias", ["one.bias and two.bias are one tensor, which would need a scale for each layer"]),
    ],
)
def test_a_weight_or_bias_of_two_layers_is_not_rescaled(shared, said, loaded):
    net, data = Twice(shared).double(), batches(6)
    uses = [("one.weight", 0, "out"), ("one.bias", 0, "vec"), ("two.weight", 0, "out")]
    spec = Spec([Node("h", 6), Node("k", 6)], [Use(t, a, "hk"["two" in t], r) for t, a, r in uses])
    expert = {n: t.clone() for n, t in net.state_dict().items()} if loaded else net
    with pytest.raises(ValueError, match=r"^rescale: ") as caught:
        rescale(net.state_dict(), [expert], net, spec, data)
    for fault in said:
        assert fault in str(caught.value)


def test_tensors_in_one_memory_are_not_taken_for_two():
    """Of experts whose module does not tie them."""
    net, data = Twice("").double(), batches(6)
    uses = [("one.weight", 0, "h"), ("two.weight", 0, "k")]
    spec = Spec([Node("h", 6), Node("k", 6)], [Use(t, a, n) for t, a, n in uses])
    for part, said in (
        ("weight", "two.weight runs 6 times in 3 batches"),
        ("bias", "one.bias is the bias of one.weight and two.weight, each of which would shift"),
    ):
        expert = dict(net.state_dict())
        expert[f"two.{part}"] = expert[f"one.{part}"]
        with pytest.raises(ValueError, match=said):
            rescale(net.state_dict(), [expert], net, spec, data)


def test_what_is_tied_but_not_rescaled_does_not_matter():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(6, 6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6, bias=False))
    net[3].weight = net[0].weight
    uses = [("1.weight", 0, "out"), ("1.bias", 0, "vec")]
    spec = Spec([Node("h", 6)], [Use(t, a, "h", r) for t, a, r in uses])
    data = [torch.arange(6).repeat(4, 1)]
    state = {n: t * 0.5 if n[0] == "1" else t for n, t in net.state_dict().items()}
    repaired = rescale(state, [net], net, spec, data)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(repaired[name], tensor)


def test_repairs_refuse_images_that_are_not_finite():
    net, data = cnn(0), batches(2, 8, 8, dtype=torch.float32)
    data[1][0, 0, 0, 0] = torch.nan
    with pytest.raises(
        ValueError, match=r"(?s)^reestimate_batchnorm: .*1\.running_mean is NaN or inf"
    ):
        reestimate_batchnorm(net.state_dict(), net, data)
    model, data = mlp(0), batches(8)
    data[1][3, 2] = torch.inf
    with pytest.raises(ValueError, match=r"^rescale: 2 problems") as caught:
        rescale(model.state_dict(), [model], model, SPEC, data)
    for name in ("0.weight", "2.weight"):
        assert f"outputs of {name} are NaN or infinite" in str(caught.value)


def test_autocast_changes_no_repair():
    net, data = cnn(0), batches(2, 8, 8, dtype=torch.float32)
    model, rows = mlp(0, torch.float32), batches(8, dtype=torch.float32)
    shrunk = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
    plain = reestimate_batchnorm(net.state_dict(), net, data)
    rescaled = rescale(shrunk, [model], model, SPEC, rows)
    with torch.autocast("cpu", torch.bfloat16):
        inside = reestimate_batchnorm(net.state_dict(), net, data)
        assert all(torch.equal(inside[name], t) for name, t in plain.items())
        inside = rescale(shrunk, [model], model, SPEC, rows)
        assert all(torch.equal(inside[name], t) for name, t in rescaled.items())
    with torch.inference_mode():
        inside = rescale(shrunk, [model], model, SPEC, rows)
        assert all(torch.equal(inside[name], t) for name, t in rescaled.items())
