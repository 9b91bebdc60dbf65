"""ExpertPool: the arena's layout, views both ways, consuming, and every complaint at the door."""

import re
import subprocess
import sys
import textwrap
from types import MappingProxyType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from neulig_fast.pool import ALIGNMENT, ExpertPool
from neulig_fast.segments import Segment, Segments

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def batch_norm_net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 5))
    for _ in range(seed + 1):
        net(torch.randn(4, 2, 3, 3))
    return net


def state_dicts(n: int = 3, **shapes: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = shapes or {"a.weight": (9, 5), "a.bias": (5,), "scale": ()}
    return [
        {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        for _ in range(n)
    ]


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert list(left) == list(right)
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype, key
        assert torch.equal(tensor, right[key]), key


# --- layout and views -------------------------------------------------------------------------


def test_modules_round_trip_exactly_in_the_original_order():
    nets = [batch_norm_net(i) for i in range(3)]
    pool = ExpertPool(nets, names=["a", "b", "c"])
    for i, net in enumerate(nets):
        expected = dict(net.state_dict())
        expected["1.num_batches_tracked"] = nets[0].state_dict()["1.num_batches_tracked"]
        assert_same(pool.state_dict(i), expected)
    assert pool.num_experts == 3
    assert pool.num_params == sum(t.numel() for t in nets[0].state_dict().values()) - 1
    assert pool.names == ("a", "b", "c")
    assert_same(pool.state_dict(-1), pool.state_dict(2))


def test_row_layout_is_parameters_then_buffers_on_aligned_starts():
    pool = ExpertPool([batch_norm_net(0)])
    names = [name for name, _ in pool.template.named_parameters()]
    assert pool.segments.names == (*names, "1.running_mean", "1.running_var")
    kinds = [segment.kind for segment in pool.segments]
    assert kinds == ["parameter"] * len(names) + ["buffer"] * 2
    first_buffer = pool.segments[pool.segments.index("1.running_mean")]
    assert pool.num_parameter_columns == first_buffer.start == pool.segments.parameters().width
    for tensor in pool.state_dict(0).values():
        if tensor.is_floating_point():
            assert tensor.data_ptr() % ALIGNMENT == 0


tensor_shapes = st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(shapes=tensor_shapes, n=st.integers(1, 4), dtype=st.sampled_from(FLOATS), data=st.data())
def test_any_shapes_round_trip_with_zero_padding(shapes, n, dtype, data):
    transposed = data.draw(st.booleans())
    experts = []
    for i in range(n):
        generator = torch.Generator().manual_seed(i)
        tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        if transposed:
            tensors = [t.permute(tuple(reversed(range(t.ndim)))) for t in tensors]
        experts.append({f"t{k}": t for k, t in enumerate(tensors)})
    pool = ExpertPool(experts)
    assert pool.params.dtype == dtype
    assert pool.params.shape == (n, pool.segments.width)
    assert pool.params.stride(1) == 1 and pool.params.is_contiguous()
    covered = torch.zeros(pool.segments.width, dtype=torch.bool)
    for segment in pool.segments:
        covered[segment.start : segment.start + segment.length] = True
        assert segment.start * dtype.itemsize % ALIGNMENT == 0
    assert pool.segments.width * dtype.itemsize % ALIGNMENT == 0
    assert not pool.params[:, ~covered].any()
    assert int(covered.sum()) == pool.num_params
    bounds = pool.segments.bounds.tolist()
    assert bounds == [*(segment.start for segment in pool.segments), pool.segments.width]
    for i, expert in enumerate(experts):
        assert_same(pool.state_dict(i), expert)


def test_state_dicts_are_views_of_the_arena():
    pool = ExpertPool(state_dicts())
    for i in range(3):
        for segment in pool.segments:
            view = pool.state_dict(i)[segment.name]
            assert view.data_ptr() == pool.params[i, segment.start :].data_ptr()
    pool.params[1].fill_(7)
    assert all(bool((tensor == 7).all()) for tensor in pool.state_dict(1).values())
    stacked = pool.segments[0]
    columns = pool.params[:, : stacked.length].view(3, *stacked.shape)
    assert torch.equal(columns[0], pool.state_dict(0)[stacked.name])


def test_the_experts_are_only_read():
    experts = state_dicts()
    before = [{k: t.clone() for k, t in expert.items()} for expert in experts]
    ExpertPool(experts).params.fill_(-1)
    for expert, kept in zip(experts, before, strict=True):
        assert_same(expert, kept)


def test_without_a_template_only_batch_norm_names_are_buffers():
    shapes = {"bn.running_mean": (3,), "bn.weight": (3,), "bn.running_var": (3,), "queue": (2,)}
    experts = state_dicts(2, **shapes)
    pool = ExpertPool(experts)
    assert pool.template is None
    assert pool.segments.names == ("bn.weight", "queue", "bn.running_mean", "bn.running_var")
    assert list(pool.state_dict(0)) == list(shapes)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)
            del self.bn.bias, self.bn.num_batches_tracked
            self.register_buffer("queue", torch.zeros(2))

    pool = ExpertPool(experts, template=Net())
    assert pool.segments.names == ("bn.weight", "bn.running_mean", "bn.running_var", "queue")


def test_the_template_is_expert_zero_with_its_mode_and_runs_any_row():
    nets = [batch_norm_net(i) for i in range(2)]
    pool = ExpertPool(nets)
    assert pool.template is nets[0] and nets[0].training
    nets[0].eval()
    images = torch.randn(4, 2, 3, 3)
    for i, net in enumerate(nets):
        merged = torch.func.functional_call(pool.template, pool.state_dict(i), (images,))
        assert torch.equal(merged, net.eval()(images))
    fresh = batch_norm_net(5)
    pool = ExpertPool([net.state_dict() for net in nets], template=fresh)
    assert pool.template is fresh and fresh.training


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        ((torch.float16, torch.float32), None, torch.float32),
        ((torch.float16, torch.bfloat16), None, torch.float32),
        ((torch.bfloat16, torch.bfloat16), None, torch.bfloat16),
        ((torch.float64, torch.float16), None, torch.float64),
        ((torch.float32, torch.float32), torch.bfloat16, torch.bfloat16),
    ],
)
def test_arena_dtype(stored, asked, expected):
    experts = [{"a": torch.ones(3, dtype=stored[0]), "b": torch.ones(2, dtype=stored[1])}]
    pool = ExpertPool(experts, dtype=asked)
    assert pool.params.dtype == expected
    assert tuple(segment.dtype for segment in pool.segments) == stored


def test_repr_says_what_it_holds():
    pool = ExpertPool(state_dicts(2, weight=(1024, 1024)), dtype=torch.bfloat16)
    expected = "ExpertPool(2 experts x 1,048,576 params, 4.0 MiB, torch.bfloat16 on cpu)"
    assert repr(pool) == expected


# --- blend ------------------------------------------------------------------------------------


def test_one_hot_blend_is_the_expert_in_one_new_row():
    pool = ExpertPool([batch_norm_net(i) for i in range(3)])
    merged = pool.blend([0.0, 1.0, 0.0])
    assert_same(merged, pool.state_dict(1))
    floats = [t for t in merged.values() if t.is_floating_point()]
    assert len({t.untyped_storage().data_ptr() for t in floats}) == 1
    assert floats[0].untyped_storage().data_ptr() != pool.params.untyped_storage().data_ptr()
    assert floats[0].untyped_storage().nbytes() == pool.segments.width * 4


def test_integers_come_from_expert_zero_unblended():
    nets = [batch_norm_net(i) for i in (2, 0, 1)]
    pool = ExpertPool(nets)
    for tensors in (pool.state_dict(1), pool.blend([0.0, 0.5, 0.5])):
        assert tensors["1.num_batches_tracked"].dtype == torch.int64
        assert int(tensors["1.num_batches_tracked"]) == 3
    assert not any("num_batches" in name for name in pool.segments.names)


def test_blend_is_linear_in_the_experts():
    experts = state_dicts()
    pool = ExpertPool(experts, dtype=torch.float64)
    weights = torch.tensor([0.5, -0.25, 2.0], dtype=torch.float64)
    for key, tensor in pool.blend(weights).items():
        terms = [w * expert[key].double() for w, expert in zip(weights, experts, strict=True)]
        assert torch.equal(tensor, terms[0] + terms[1] + terms[2])


def test_blend_takes_one_set_of_weights_per_tensor():
    pool = ExpertPool(state_dicts())
    merged = pool.blend(torch.eye(3))
    for i, name in enumerate(pool.segments.names):
        assert torch.equal(merged[name], pool.state_dict(i)[name])


@pytest.mark.parametrize("per_tensor", [False, True])
def test_gradients_flow_through_the_views(per_tensor):
    pool = ExpertPool(state_dicts(), dtype=torch.float64)
    shape = (len(pool.segments), 3) if per_tensor else (3,)
    weights = torch.full(shape, 0.2, dtype=torch.float64, requires_grad=True)
    merged = pool.blend(weights)
    (2 * merged["a.weight"].sum() + merged["scale"]).backward()
    weight = torch.stack([2 * pool.state_dict(i)["a.weight"].sum() for i in range(3)])
    scale = torch.stack([pool.state_dict(i)["scale"] for i in range(3)])
    if per_tensor:
        rows = {"a.weight": weight, "a.bias": torch.zeros_like(weight), "scale": scale}
        expected = torch.stack([rows[name] for name in pool.segments.names])
    else:
        expected = weight + scale
    torch.testing.assert_close(weights.grad, expected)


@pytest.mark.parametrize("shape", [(2,), (4,), (2, 3), (1, 3), (3, 2), (2, 3, 3), ()])
def test_blend_refuses_other_shapes(shape):
    pool = ExpertPool(state_dicts())
    with pytest.raises(ValueError, match=r"weights must be \(N,\) = \(3,\) or \(S, N\) = \(3, 3\)"):
        pool.blend(torch.zeros(shape))


def test_rows_and_experts_that_do_not_exist():
    pool = ExpertPool(state_dicts())
    with pytest.raises(ValueError, match="row must be"):
        pool.row_state_dict(torch.zeros(pool.segments.width + 1))
    for i in (3, -4):
        with pytest.raises(IndexError, match="below 3"):
            pool.state_dict(i)


def test_experts_share_integers_and_merged_models_own_theirs():
    pool = ExpertPool([batch_norm_net(i) for i in range(2)])
    name = "1.num_batches_tracked"
    assert pool.state_dict(0)[name] is pool.state_dict(1)[name]
    merged = pool.blend([0.5, 0.5])
    merged[name] += 5
    assert int(pool.state_dict(0)[name]) == int(pool.blend([0.5, 0.5])[name]) == 1


# --- consume ----------------------------------------------------------------------------------


def test_consumed_modules_become_views_and_still_run():
    nets = [batch_norm_net(i) for i in range(2)]
    kept = [{k: t.clone() for k, t in net.state_dict().items()} for net in nets]
    images = torch.randn(4, 2, 3, 3)
    outputs = [net.eval()(images) for net in nets]
    outputs[0].sum().backward()
    pool = ExpertPool(nets, consume=True)
    for i, net in enumerate(nets):
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():
                assert tensor.data_ptr() == pool.state_dict(i)[name].data_ptr()
        assert_same(dict(net.state_dict()), kept[i])
        assert all(p.requires_grad and p.grad is None for p in net.parameters())
        assert torch.equal(net(images), outputs[i])


def test_consumed_state_dicts_are_emptied():
    experts = [dict(batch_norm_net(i).state_dict()) for i in range(2)]
    kept = [dict(expert) for expert in experts]
    pool = ExpertPool(experts, consume=True)
    assert experts == [{}, {}]
    kept[1]["1.num_batches_tracked"] = kept[0]["1.num_batches_tracked"]
    for i in range(2):
        assert_same(pool.state_dict(i), kept[i])


def test_consuming_converts_modules_to_the_arena_dtype():
    net = batch_norm_net(0)
    ExpertPool([net], dtype=torch.bfloat16, consume=True)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}


def test_nothing_is_consumed_when_an_expert_is_refused():
    experts = state_dicts()
    experts[2]["a.bias"][3] = torch.nan
    kept = [dict(expert) for expert in experts]
    with pytest.raises(ValueError, match="1 NaN"):
        ExpertPool(experts, consume=True)
    for expert, before in zip(experts, kept, strict=True):
        assert list(expert) == list(before)
        assert all(expert[k] is before[k] for k in expert)


def test_what_cannot_be_consumed():
    expert = state_dicts(1)[0]
    with pytest.raises(ValueError, match=r"experts\[1\] is experts\[0\] again"):
        ExpertPool([expert, expert], consume=True)
    with pytest.raises(ValueError, match="read-only"):
        ExpertPool([MappingProxyType(expert)], consume=True)
    assert ExpertPool([expert, expert]).num_experts == 2
    assert ExpertPool([MappingProxyType(expert)]).num_experts == 1


@pytest.mark.parametrize("consume", [False, True])
def test_tied_parameters_keep_their_values(consume):
    net = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    net["b"].weight = net["a"].weight
    value = net["a"].weight.detach().clone()
    pool = ExpertPool([net], consume=consume)
    assert {segment.kind for segment in pool.segments} == {"parameter"}
    assert torch.equal(pool.state_dict(0)["a.weight"], value)
    assert torch.equal(pool.state_dict(0)["b.weight"], value)
    assert net["a"].weight is net["b"].weight and torch.equal(net["a"].weight, value)


MEMORY = r"""
    import re, torch
    from neulig_fast.pool import ExpertPool

    MB = 1 << 20

    def experts(as_modules):
        dicts = [
            {f"t{k}": torch.full((4 * MB,), i + k + 1.0) for k in range(4)} for i in range(4)
        ]
        return list(map(torch.nn.ParameterDict, dicts)) if as_modules else dicts

    def memory(which):
        # Not getrusage: its peak begins with that of the process that started this one.
        with open("/proc/self/status") as file:
            return int(re.search(which + r":\s+(\d+) kB", file.read())[1]) / 1024

    def extra(as_modules, consume):
        inputs = experts(as_modules)
        before = memory("VmRSS")
        pool = ExpertPool(inputs, consume=consume)
        peak = memory("VmHWM")
        assert pool.params[:, :: 4 * MB].sum() == 64
        return peak - before

    ExpertPool([{"warm": torch.ones(3)}])
    # The peak never falls, so the frugal ways come first.
    print(extra(False, True), extra(True, True), extra(False, False))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_peak_memory_is_one_copy_and_none_when_consuming():
    """4 experts of 4 tensors of 16 MB: 256 MB of inputs, already there when we start to measure."""
    run = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(MEMORY)]
    output = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    dicts, modules, copied = map(float, output.split())
    tensor, arena, small = 16, 256, 12
    assert dicts <= tensor + small
    assert modules <= tensor + small
    assert arena - small <= copied <= arena + small


# --- complaints -------------------------------------------------------------------------------


def test_every_mismatch_is_listed_in_one_error():
    good = {"w": torch.ones(2, 3), "v": torch.ones(4), "n": torch.tensor(1)}
    ill = torch.tensor([1.0, torch.nan, torch.inf, -torch.inf])
    experts = [
        good,
        {"w": torch.ones(3, 2), "n": torch.tensor(1), "extra": torch.ones(1)},
        {"w": torch.ones(2, 3).half(), "v": ill, "n": torch.tensor(1)},
        {"w": torch.ones(2, 3), "v": torch.ones(4).to_sparse(), "n": torch.tensor(1.0)},
        {"w": torch.full((2,), torch.inf).half(), "v": torch.ones(4), "n": torch.tensor(1)},
    ]
    with pytest.raises(ValueError) as error:
        ExpertPool(experts, names=["cars", "birds", "maps", "toys", "bad"])
    assert str(error.value).splitlines() == [
        "ExpertPool: 10 problems",
        "  - expert 1 ('birds') lacks v, which expert 0 ('cars') has",
        "  - expert 1 ('birds') has extra, which expert 0 ('cars') lacks",
        "  - expert 1 ('birds'): w has shape (3, 2), expert 0 ('cars') has (2, 3)",
        "  - expert 2 ('maps'): w has dtype torch.float16, expert 0 ('cars') has torch.float32",
        "  - expert 2 ('maps'): v has 1 NaN and 2 infinite values among 4",
        "  - expert 3 ('toys'): v is torch.sparse_coo; only dense tensors can be blended",
        "  - expert 3 ('toys'): n has dtype torch.float32, expert 0 ('cars') has torch.int64",
        "  - expert 4 ('bad'): w has shape (2,), expert 0 ('cars') has (2, 3)",
        "  - expert 4 ('bad'): w has dtype torch.float16, expert 0 ('cars') has torch.float32",
        "  - expert 4 ('bad'): w has 0 NaN and 2 infinite values among 2",
    ]


UNUSABLE = [
    ("text", "not a tensor"),
    ({"state_dict": 1}, "not a tensor"),
    (torch.ones(2, 2).to_sparse(), "only dense tensors"),
    (torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), "only dense tensors"),
    (torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "is quantized"),
    (torch.ones(2, device="meta"), "meta device"),
    (torch.ones(2, dtype=torch.complex64), "torch.complex64; fp32, bf16"),
    (torch.ones(2).to(torch.float8_e4m3fn), "torch.float8_e4m3fn; fp32, bf16"),
    (nn.UninitializedParameter(), "lazy module"),
    (torch.tensor([1.0, torch.nan]), "1 NaN and 0 infinite values among 2"),
]


@pytest.mark.parametrize(("value", "message"), UNUSABLE)
def test_entries_that_cannot_be_blended(value, message):
    with pytest.raises(ValueError, match=rf"expert 0: b .*{re.escape(message)}"):
        ExpertPool([{"a": torch.ones(2), "b": value}])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [0, 1500, -1])
def test_one_non_finite_value_is_found_anywhere(dtype, bad, where):
    tensor = torch.linspace(-1, 1, 3001).to(dtype)
    tensor[where] = bad
    with pytest.raises(ValueError, match=r"t has \d NaN and \d infinite values among 3001"):
        ExpertPool([{"t": tensor}])


def test_values_that_overflow_the_arena_dtype():
    experts = [{"t": torch.tensor([-1e6, 1.0])}]
    with pytest.raises(ValueError, match=r"from -1e\+06 to 1, which overflow torch.float16"):
        ExpertPool(experts, dtype=torch.float16)
    assert ExpertPool(experts, dtype=torch.bfloat16).num_params == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), ValueError, "at least one expert"),
        (([{}],), ValueError, r"no float tensors \(P = 0\)"),
        (([{"n": torch.tensor(1)}],), ValueError, r"no float tensors \(P = 0\)"),
        (([{3: torch.ones(1)}],), ValueError, "not a string"),
        ((state_dicts(2), None, ["a"]), ValueError, "got 1 names for 2 experts"),
        ((state_dicts(2), None, ["a", "a"]), ValueError, "more than one 'a'"),
        ((state_dicts(2), None, "ab"), ValueError, "a list of names, got the string 'ab'"),
        ((state_dicts(2), None, None, torch.int8), ValueError, "dtype must be fp32"),
        ((state_dicts(2), None, None, None, "meta"), ValueError, "must hold values"),
        (([torch.ones(3)],), TypeError, r"experts\[0\] must be a module or a state dict"),
        ((state_dicts(1)[0],), TypeError, "got a single one"),
        ((nn.Linear(1, 1),), TypeError, "got a single one"),
        ((state_dicts(2), "ViT"), TypeError, "template must be"),
    ],
)
def test_arguments_that_cannot_be(arguments, error, message):
    with pytest.raises(error, match=message):
        ExpertPool(*arguments)


def test_experts_must_fit_the_template():
    with pytest.raises(ValueError) as error:
        ExpertPool([{"weight": torch.ones(2, 3), "gain": torch.ones(1)}], template=nn.Linear(2, 3))
    text = str(error.value)
    assert "expert 0 lacks bias, which the template has" in text
    assert "expert 0 has gain, which the template lacks" in text
    assert "weight has shape (2, 3), the template has (3, 2)" in text
    with torch.device("meta"):
        skeleton = nn.Linear(2, 3)
    pool = ExpertPool([nn.Linear(2, 3).state_dict()], template=skeleton)
    assert pool.num_params == 9


# --- fingerprint ------------------------------------------------------------------------------


def test_fingerprint_is_content_whatever_its_origin():
    nets = [batch_norm_net(i) for i in range(2)]
    fingerprint = ExpertPool(nets).fingerprint
    assert re.fullmatch(r"[0-9a-f]{64}", fingerprint)
    copies = [{k: t.clone() for k, t in net.state_dict().items()} for net in nets]
    assert ExpertPool(copies, names=["x", "y"]).fingerprint == fingerprint
    assert ExpertPool(nets[::-1]).fingerprint != fingerprint


def test_fingerprint_sees_every_kind_of_change():
    def variant(**change):
        base = {"a": torch.tensor([0.0, 1.0]), "b": torch.ones(2, 2), "n": torch.tensor(3)}
        return ExpertPool([base, {**base, **change}]).fingerprint

    prints = [
        variant(),
        variant(a=torch.tensor([-0.0, 1.0])),
        variant(b=torch.tensor([[1, 1], [1, 1 + 2**-23]])),
        ExpertPool([{"a": torch.tensor([0.0, 1.0])}]).fingerprint,
        ExpertPool([{"z": torch.tensor([0.0, 1.0])}]).fingerprint,
        ExpertPool([{"a": torch.tensor([[0.0, 1.0]])}]).fingerprint,
        ExpertPool([{"a": torch.tensor([0.0, 1.0]).half()}]).fingerprint,
        ExpertPool([{"a": torch.tensor([0.0, 1.0]), "n": torch.tensor(3)}]).fingerprint,
        ExpertPool([{"a": torch.tensor([0.0, 1.0]), "n": torch.tensor(4)}]).fingerprint,
        ExpertPool([{"a": torch.tensor([0.0, 1.0])}] * 2).fingerprint,
    ]
    assert len(set(prints)) == len(prints)


# --- modules that run other code ----------------------------------------------------------------


class Scaled(nn.Module):
    """A state dict says nothing of its activation, its dropout and its scale."""

    def __init__(self, act=nn.GELU, drop=0.1, scale=2.0):
        super().__init__()
        self.linear, self.act = nn.Linear(3, 3), act()
        self.drop = nn.Dropout(drop) if drop else nn.Identity()
        self.register_buffer("scale", torch.tensor(scale), persistent=False)


class Doubled(Scaled):
    pass


def test_modules_that_run_other_code_are_refused_each_difference_named():
    extra = Scaled()
    extra.last = nn.Tanh()
    extra.register_buffer("mask", torch.ones(2), persistent=False)
    experts = [
        Scaled(),
        Scaled(lambda: nn.GELU("tanh"), scale=3.0),
        Doubled(nn.ReLU),
        extra,
        Scaled(drop=0.0),
    ]
    with pytest.raises(ValueError) as error:
        ExpertPool(experts)
    here = Scaled.__module__
    advice = "; if that does not matter, give the module's state_dict()"
    assert str(error.value).splitlines() == [
        "ExpertPool: 6 problems",
        "  - expert 1: act is nn.GELU(approximate='tanh'), expert 0: nn.GELU(approximate='none')"
        + advice,
        "  - expert 1: scale, a buffer that is not saved, differs from that of expert 0" + advice,
        f"  - expert 2: the module is {here}.Doubled, expert 0: {here}.Scaled" + advice,
        "  - expert 2: act is nn.ReLU(), expert 0: nn.GELU(approximate='none')" + advice,
        "  - expert 3: last is nn.Tanh(), expert 0: missing" + advice,
        "  - expert 3: mask, a buffer that is not saved, differs from that of expert 0" + advice,
    ]
    assert ExpertPool([experts[0], *(e.state_dict() for e in experts[1:])]).num_experts == 5
    with pytest.raises(ValueError, match=r"expert 0: act is nn\.GELU.*, the template: nn\.ReLU"):
        ExpertPool(experts[:1], template=Scaled(nn.ReLU))
    assert ExpertPool([Scaled().half()], template=Scaled()).params.dtype == torch.float16
    with pytest.raises(ValueError, match="scale, a buffer that is not saved"):
        ExpertPool([Scaled()], template=Scaled().to("meta"))


def test_device_zero_is_a_device():
    if torch.cuda.is_available():
        assert ExpertPool(state_dicts(1), device=0).params.device == torch.device(0)
    else:  # not the CPU, where the experts are
        with pytest.raises((RuntimeError, AssertionError)):
            ExpertPool(state_dicts(1), device=0)


# --- segments ---------------------------------------------------------------------------------


def segment(name: str, start: int, length: int, kind: str = "parameter") -> Segment:
    return Segment(name, (length,), start, length, torch.float32, kind)


def test_segments_refuse_every_broken_rule_at_once():
    broken = [
        segment("a", 1, 4),
        segment("b", 4, 4, "buffer"),
        segment("b", 12, 4),
        Segment("c", (2, 2), 16, 5, torch.float32, "buffer"),
    ]
    with pytest.raises(ValueError) as error:
        Segments(broken, 18, alignment=4)
    assert str(error.value).splitlines() == [
        "Segments: 7 problems",
        "  - a starts at 1, not a multiple of 4",
        "  - b starts at 4, before the previous tensor ends at 5",
        "  - b appears twice",
        "  - b is a parameter behind a buffer",
        "  - c has length 5 but shape (2, 2)",
        "  - a starts at 1, the first must start at 0",
        "  - width must be a multiple of 4 that holds 21 elements, got 18",
    ]
    with pytest.raises(ValueError, match="alignment"):
        Segments([], 0, alignment=0)
    with pytest.raises(ValueError, match="0 without tensors"):
        Segments([], 4)


def test_segments_are_a_sequence_with_names():
    segments = Segments([segment("a.w", 0, 3), segment("b", 4, 1)], 8, alignment=4)
    assert len(segments) == 2 and segments[1].name == "b" and segments[:1] == (segments[0],)
    assert segments.index("b") == 1 and segments.index(segments[0]) == 0
    assert segments.bounds.tolist() == [0, 4, 8] and segments.bounds.dtype == torch.int64
    assert segments.bounds_on("cpu") is segments.bounds_on(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"no tensor called 'a.v'; did you mean 'a.w'\?"):
        segments.index("a.v")
    with pytest.raises(ValueError, match="no tensor called 'b'"):
        segments.index("b", 0, 1)
    assert Segments([], 0).bounds.tolist() == [0]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("visual.transformer.resblocks.3.attn.in_proj_weight", "visual.transformer.resblocks.3"),
        ("visual.transformer.resblocks.11.mlp.0.weight", "visual.transformer.resblocks.11"),
        ("visual.conv1.weight", "visual.conv1"),
        ("layer2.0.downsample.1.bias", "layer2.0"),
        ("visual.proj", "visual"),
        ("0.weight", "0"),
        ("4.attn.weight", "4"),
        ("prompts.2", "prompts.2"),
        ("logit_scale", "logit_scale"),
    ],
)
def test_layer_labels(name, layer):
    assert Segments([segment(name, 0, 1)], 1).layers() == [layer]
