"""blend_lists and blend_lists_: the arena's bits, hostile lists, gradients, errors."""

import copy
import logging
import pickle

import pytest
import torch

import neulig_fast
from neulig_fast import tensor_lists, testing
from neulig_fast._registry import OPS
from neulig_fast.tensor_lists import TensorLists

OP = OPS["blend_lists"]
BACKENDS = testing.backends_of(OPS["blend_lists"])
on_every_backend = pytest.mark.parametrize("device, backend", BACKENDS)
in_every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
SHAPES = [(), (1,), (0,), (3, 0), (5, 3), (17,), (2, 3, 129), (2048,), (16385,)]
FEW = [*SHAPES[:7], (2050,)]  # for Triton's interpreter, which takes milliseconds per chunk
needs_native = pytest.mark.skipif(
    OP.why_not("cpu", "cpu") is not None, reason="the C++ extension is not built"
)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams are CUDA's")


def shapes_for(device, backend):
    return FEW if (device, backend) == ("cpu", "triton") else SHAPES


def forcing(backend):
    return neulig_fast.use_backend(blend_lists=backend, blend_lists_weight_grad=backend)


def normal(*shape, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def make_lists(n, shapes, device="cpu", dtype=torch.float32, shift=0):
    """N lists in one matrix, each tensor ``shift`` elements past a boundary of 64, and the matrix
    with its bounds (padding in segments of its own), as blend takes them."""
    bounds, starts = [0], []
    for shape in shapes:
        starts.append(bounds[-1] + shift)
        bounds += [starts[-1], starts[-1] + torch.Size(shape).numel()]
        bounds.append(-(-bounds[-1] // 64) * 64)
    arena = normal(n, bounds[-1], device=device, dtype=dtype)
    lists = [
        [row[a : a + torch.Size(s).numel()].view(s) for a, s in zip(starts, shapes, strict=True)]
        for row in arena
    ]
    return lists, arena, bounds


def from_arena(weights, arena, bounds, shapes):
    """The blended tensors by way of blend, which has tests of its own."""
    if weights.ndim == 2:  # every tensor's segment, and one of padding before and after it
        weights = weights.repeat_interleave(3, 0)
        row = neulig_fast.blend(weights, arena, torch.tensor(bounds, device=arena.device))
    else:
        row = neulig_fast.blend(weights, arena)
    starts = bounds[1::3]
    return [row[a : a + torch.Size(s).numel()].view(s) for a, s in zip(starts, shapes, strict=True)]


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        assert torch.equal(a, b)


def truncates(device, backend, dtype):
    """Triton's interpreter truncates fp32 to bf16 where the compiled kernel rounds."""
    return backend == "triton" and device == "cpu" and dtype == torch.bfloat16


# -- bits ------------------------------------------------------------------------------------------


@in_every_dtype
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("n", [1, 2, 5, 9, 17])
@on_every_backend
def test_lists_have_the_arenas_bits(device, backend, n, shift, dtype):
    shapes = shapes_for(device, backend)
    lists, arena, bounds = make_lists(n, shapes, device=device, dtype=dtype, shift=shift)
    for weights in (normal(n, device=device), normal(len(shapes), n, device=device, seed=1)):
        expected = from_arena(weights, arena, bounds, shapes)
        with forcing(backend):
            got = neulig_fast.blend_lists(weights, lists)
        if truncates(device, backend, dtype):
            for a, b in zip(got, expected, strict=True):
                testing.assert_within_rule(a, b, b.double())
        else:
            assert_same(got, expected)


@pytest.mark.parametrize("n", [3, 4, 6, 7, 8, 16, 33, 64])
@on_every_backend
def test_any_number_of_experts(device, backend, n):
    shapes = [(700,), (3,)]
    lists, arena, bounds = make_lists(n, shapes, device=device)
    weights = normal(n, device=device, seed=1)
    with forcing(backend):
        got = neulig_fast.blend_lists(weights, lists)
    assert_same(got, from_arena(weights, arena, bounds, shapes))


@in_every_dtype
@pytest.mark.parametrize("out_dtype", testing.DTYPES, ids=str)
@on_every_backend
def test_output_dtypes_are_one_rounding_of_the_sum(device, backend, dtype, out_dtype):
    if truncates(device, backend, out_dtype):
        pytest.skip("Triton's interpreter truncates fp32 to bf16; the house test bounds it")
    lists, _, _ = make_lists(3, [(129,), (70,), ()], device=device, dtype=dtype)
    weights = normal(3, device=device, seed=1)
    acc = torch.promote_types(dtype, torch.float32)
    sums = neulig_fast.blend_lists(weights, [[x.to(acc) for x in xs] for xs in lists])
    with forcing(backend):
        got = neulig_fast.blend_lists(weights, lists, out_dtype)
        outputs = [torch.empty(x.numel() + 1, dtype=out_dtype, device=device)[1:] for x in sums]
        neulig_fast.blend_lists_([o.view(x.shape) for o, x in zip(outputs, sums, strict=True)],
                                 weights, lists)  # fmt: skip
    assert_same(got, [x.to(out_dtype) for x in sums])
    assert_same([o.view(x.shape) for o, x in zip(outputs, sums, strict=True)], got)


@on_every_backend
def test_mixed_dtypes_shapes_and_addresses_at_once(device, backend):
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32]
    if truncates(device, backend, torch.bfloat16):
        dtypes[1] = torch.float16
    lists = [
        [normal(t + 65, device=device, dtype=d, seed=9 * i + t)[t % 3 :]
         for t, d in enumerate(dtypes)]
        for i in range(3)
    ]  # fmt: skip
    weights = normal(5, 3, device=device, seed=1)
    expected = OP.reference(weights, [x for xs in lists for x in xs])
    with forcing(backend):
        assert_same(neulig_fast.blend_lists(weights, lists), expected)
        assert_same(neulig_fast.blend_lists(weights.double(), TensorLists(lists)), expected)
        outputs = [torch.empty_like(x) for x in expected]
        assert neulig_fast.blend_lists_(outputs, weights, lists) is outputs
    assert_same(outputs, expected)


@in_every_dtype
@on_every_backend
def test_nan_infinity_and_overflow_pass_through(device, backend, dtype):
    info = torch.finfo(dtype)
    row = [float("nan"), float("inf"), -float("inf"), info.max, info.tiny, 1.0]
    lists = [[torch.tensor(row, device=device, dtype=dtype)],
             [torch.ones(6, device=device, dtype=dtype)]]  # fmt: skip
    with forcing(backend):
        (kept,) = neulig_fast.blend_lists(torch.tensor([1.0, 0.0], device=device), lists)
        (dropped,) = neulig_fast.blend_lists(torch.tensor([0.0, 1.0], device=device), lists)
        (twice,) = neulig_fast.blend_lists(torch.tensor([1.0, 1.0], device=device), [lists[0]] * 2)
    assert torch.equal(kept.nan_to_num(0.5, 7.0, -7.0), lists[0][0].nan_to_num(0.5, 7.0, -7.0))
    assert dropped[:3].isnan().all() and torch.equal(dropped[3:], lists[1][0][3:])
    assert twice[3].isinf()


@on_every_backend
def test_negated_weights_have_their_sign(device, backend):
    lists, _, _ = make_lists(2, [(17,)], device=device)
    weights = normal(2, device=device)
    with forcing(backend):
        got = neulig_fast.blend_lists(torch._neg_view(weights), lists)
        assert_same(got, neulig_fast.blend_lists(-weights, lists))


@on_every_backend
def test_nothing_but_the_outputs_is_written(device, backend):
    lists, _, _ = make_lists(3, [(129,), (1500,), ()], device=device)
    buffer = torch.full((1700,), 7.0, device=device)
    outputs = [buffer[3:132], buffer[137:1637], buffer[1640]]
    with forcing(backend):
        neulig_fast.blend_lists_(outputs, normal(3, device=device), lists)
        expected = neulig_fast.blend_lists(normal(3, device=device), lists)
    assert_same(outputs, expected)
    gaps = torch.cat([buffer[:3], buffer[132:137], buffer[1637:1640], buffer[1641:]])
    assert torch.equal(gaps, torch.full_like(gaps, 7.0))


@on_every_backend
def test_lists_of_nothing(device, backend):
    weights = normal(2, device=device)
    with forcing(backend):
        assert neulig_fast.blend_lists(weights, [[], []]) == []
        assert neulig_fast.blend_lists(weights.new_ones(0, 2), TensorLists([[], []])) == []
        assert neulig_fast.blend_lists_([], weights, [[], []]) == []
        empty = [[torch.ones(0, 3, device=device)]] * 2
        assert neulig_fast.blend_lists(weights, empty)[0].shape == (0, 3)


@needs_native
def test_results_start_on_boundaries_of_their_buffer():
    results = neulig_fast.blend_lists(normal(2), make_lists(2, SHAPES)[0])
    offsets = [x.data_ptr() - results[0].data_ptr() for x in results if x.numel()]
    assert all(offset % 128 == 0 for offset in offsets)


def test_results_are_tensors_of_their_own():
    first, second = neulig_fast.blend_lists(normal(2), make_lists(2, [(3,), (4,)])[0])
    before, version = second.clone(), second._version
    first.fill_(9.0)
    assert torch.equal(second, before) and second._version == version


def test_results_with_a_gradient_can_be_written_to():
    lists = make_lists(2, [(3,), (4,)])[0]
    weights = normal(2).requires_grad_()
    first, second = neulig_fast.blend_lists(weights, lists)
    first.mul_(2.0)
    (got,) = torch.autograd.grad(first.sum() + second.sum(), weights)
    expected = torch.stack([2 * a.sum() + b.sum() for a, b in lists])
    torch.testing.assert_close(got, expected)


@needs_native
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_outputs_too_large_for_the_caches_have_the_same_bits(dtype):
    size = (32 << 20) // dtype.itemsize + 77
    lists = [[normal(size + 3, dtype=dtype, seed=i)[3:], normal(9)] for i in range(2)]
    weights = normal(2, seed=5)
    buffer = torch.empty(size + 1, dtype=dtype)
    with forcing("cpu"):
        got = neulig_fast.blend_lists(weights, lists)
        neulig_fast.blend_lists_([buffer[1:], torch.empty(9)], weights, lists)
    assert_same(got, OP.reference(weights, [x for xs in lists for x in xs]))
    assert torch.equal(buffer[1:], got[0])


BITS = """
import hashlib, torch, neulig_fast
def digest():
    g = torch.Generator().manual_seed(0)
    digest = hashlib.sha256()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        lists = [[torch.randn(n, generator=g).to(dtype) for n in (7, 200_001, 5, 16384)]
                 for _ in range(5)]
        weights = torch.randn(4, 5, generator=g, requires_grad=True)
        outputs = neulig_fast.blend_lists(weights, lists, out_dtype=torch.bfloat16)
        torch.autograd.backward(outputs, outputs)
        for x in (*outputs, weights.grad):
            digest.update(x.detach().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
for threads in (1, 2):
    torch.set_num_threads(threads)
    print(digest())
"""


@needs_native
def test_threads_and_instruction_sets_give_the_same_bits(python):
    levels = ("0", "3", "")  # the last: the best there is
    runs = [python(BITS, NEULIG_FAST_BACKEND="cpu", NEULIG_FAST_CPU=level) for level in levels]
    able = [r for r in runs if "NEULIG_FAST_CPU" not in r.stderr]  # an older CPU lacks a level
    assert all(r.returncode == 0 for r in able), [r.stderr for r in able]
    assert len(able) >= 2 and len({line for r in able for line in r.stdout.split()}) == 1


# -- prepared lists --------------------------------------------------------------------------------


@on_every_backend
def test_prepared_lists_see_what_is_written_to_the_tensors(device, backend):
    lists, _, _ = make_lists(2, [(33,), (5,)], device=device)
    prepared, weights = TensorLists(lists), normal(2, device=device)
    with forcing(backend):
        neulig_fast.blend_lists(weights, prepared)
        lists[1][0].zero_()
        again = neulig_fast.blend_lists(weights, prepared)
        assert_same(again, neulig_fast.blend_lists(weights, lists))
    assert repr(prepared) == "TensorLists(2 experts of 2 tensors)"


@on_every_backend
def test_prepared_outputs(device, backend):
    lists, _, _ = make_lists(2, [(33,), (5,)], device=device)
    prepared, weights = TensorLists(lists), normal(2, device=device)
    outputs = TensorLists([[torch.empty(33, device=device), torch.empty(5, device=device)]])
    with forcing(backend):
        for _ in range(2):
            assert neulig_fast.blend_lists_(outputs, weights, prepared) is outputs
            assert_same(outputs.lists[0], neulig_fast.blend_lists(weights, lists))
            weights = weights * 2
    with pytest.raises(ValueError, match="outputs must be one list, got 2"):
        neulig_fast.blend_lists_(prepared, weights, prepared)


def test_a_copy_of_prepared_lists_reads_its_own_tensors():
    prepared, weights = TensorLists(make_lists(2, [(33,), (5,)])[0]), normal(2)
    before = neulig_fast.blend_lists(weights, prepared)
    for made in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert not {x.data_ptr() for x in made.flat} & {x.data_ptr() for x in prepared.flat}
        assert_same(neulig_fast.blend_lists(weights, made), before)
        made.flat[0].zero_()
        assert neulig_fast.blend_lists(weights, made)[0].ne(before[0]).any()


def test_the_default_device_does_not_matter():
    lists, _, _ = make_lists(2, [(33,), (5,)])
    weights = normal(2).requires_grad_()
    expected = neulig_fast.blend_lists(weights, lists)
    (gradient,) = torch.autograd.grad(expected, weights, expected)
    outputs = [torch.empty(33), torch.empty(5)]
    with torch.device("meta"):
        got = neulig_fast.blend_lists(weights, lists)
        assert torch.equal(torch.autograd.grad(got, weights, expected)[0], gradient)
        neulig_fast.blend_lists_(outputs, weights.detach(), lists)
    assert_same(got, expected)
    assert_same(outputs, [x.detach() for x in expected])


def test_what_runs_is_logged_on_both_roads(caplog):
    lists, _, _ = make_lists(2, [(4,)])
    weights = normal(2).requires_grad_()
    with caplog.at_level(logging.DEBUG, "neulig_fast.dispatch"), forcing("torch"):
        for call in (neulig_fast.blend_lists, torch.ops.neulig_fast.blend_lists):
            experts = lists if call is neulig_fast.blend_lists else [x for xs in lists for x in xs]
            caplog.clear()
            call(weights, experts)[0].sum().backward()
            assert caplog.messages == [
                "blend_lists: torch on cpu", "blend_lists_weight_grad: torch on cpu",
            ]  # fmt: skip
        caplog.clear()
        neulig_fast.blend_lists_([torch.zeros(4)], weights.detach(), lists)
        assert caplog.messages == ["blend_lists: torch on cpu"]


def test_no_table_is_made_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"while a CUDA graph is captured; use TensorLists"):
        tensor_lists.on_device(tensor_lists.host([1]), torch.device("cuda", 0))


@needs_cuda
def test_prepared_lists_serve_every_stream():
    lists, _, _ = make_lists(2, [(33,), (5,)], device="cuda")
    weights = normal(2, device="cuda")
    expected = neulig_fast.blend_lists(weights, lists)
    for _ in range(3):  # the last ones get memory that was used before
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        prepared = TensorLists(lists)
        torch.cuda.synchronize()
        with torch.cuda.stream(first):
            torch.cuda._sleep(200_000_000)  # a tenth of a second
            slow = neulig_fast.blend_lists(weights, prepared)
        with torch.cuda.stream(second):
            fast = neulig_fast.blend_lists(weights, prepared)
            second.synchronize()
            assert not first.query()
            assert_same(fast, expected)
        del prepared
        torch.cuda.synchronize()
        assert_same(slow, expected)


@needs_cuda
def test_prepared_lists_in_a_graph():
    lists, _, _ = make_lists(2, [(33,), (5,)], device="cuda")
    weights, prepared = normal(2, device="cuda"), TensorLists(lists)
    refused = pytest.raises(RuntimeError, match="while a CUDA graph is captured")
    with refused, torch.cuda.graph(torch.cuda.CUDAGraph()):
        neulig_fast.blend_lists(weights, prepared)
    neulig_fast.blend_lists(weights, prepared)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = neulig_fast.blend_lists(weights, prepared)
    weights.mul_(2.0)
    graph.replay()
    assert_same(results, neulig_fast.blend_lists(weights, lists))


def test_modules_parameters_are_lists():
    modules = [torch.nn.Linear(3, 2) for _ in range(2)]
    weights = torch.tensor([0.5, 0.5], requires_grad=True)
    results = neulig_fast.blend_lists(weights, [m.parameters() for m in modules])
    sum(r.sum() for r in results).backward()
    assert [r.shape for r in results] == [(2, 3), (2,)]
    assert modules[0].weight.grad is None and weights.grad is not None
    with torch.no_grad():
        target = torch.nn.Linear(3, 2)
        experts = [m.parameters() for m in modules]
        neulig_fast.blend_lists_(list(target.parameters()), weights.detach(), experts)
    assert_same([p.detach() for p in target.parameters()], [r.detach() for r in results])


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [True, False])
@on_every_backend
def test_gradcheck(device, backend, rows):
    if (device, backend) == ("cpu", "triton"):
        pytest.skip("a minute in the interpreter; its gradients are compared below")
    lists, _, _ = make_lists(3, [(5,), (), (2, 3), (0,)], device=device, dtype=torch.float64)
    shape = (4, 3) if rows else (3,)
    weights = normal(*shape, device=device, dtype=torch.float64).requires_grad_()
    flat = [x for xs in lists for x in xs]
    with forcing(backend):
        for call in (
            lambda w: tuple(neulig_fast.blend_lists(w, lists)),
            lambda w: tuple(torch.ops.neulig_fast.blend_lists(w, flat)),
        ):
            assert torch.autograd.gradcheck(call, weights)


@in_every_dtype
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [True, False])
@on_every_backend
def test_gradient_is_that_of_the_arena(device, backend, rows, out_dtype, dtype):
    shapes = shapes_for(device, backend)
    lists, arena, _ = make_lists(3, shapes, device=device, dtype=dtype)
    acc = torch.promote_types(dtype, torch.float32)
    shape = (len(shapes), 3) if rows else (3,)
    weights = normal(*shape, device=device, dtype=acc).requires_grad_()
    with forcing(backend):
        results = neulig_fast.blend_lists(weights, lists, out_dtype)
        seeds = [normal(*r.shape, device=device, seed=t).to(r.dtype)
                 for t, r in enumerate(results)]  # fmt: skip
        got = torch.autograd.grad(results, weights, seeds)[0]
    wide = [x.double() for xs in lists for x in xs]
    reference = OPS["blend_lists_weight_grad"].reference
    oracle = reference(weights.detach().double(), [s.double() for s in seeds], wide)
    working = reference(weights.detach(), seeds, [x for xs in lists for x in xs])
    testing.assert_within_rule(got, working, oracle, arena.shape[1])


@on_every_backend
def test_outputs_that_are_not_used_have_no_gradient(device, backend):
    lists, _, _ = make_lists(2, [(4,), (5,), (6,)], device=device)
    weights = normal(3, 2, device=device).requires_grad_()
    flat = [x for xs in lists for x in xs]
    with forcing(backend):
        for results in (
            neulig_fast.blend_lists(weights, lists),
            torch.ops.neulig_fast.blend_lists(weights, flat),
        ):
            (grad,) = torch.autograd.grad(results[1].sum(), weights)
            assert torch.equal(grad[::2], torch.zeros(2, 2, device=device))
            sums = torch.stack([xs[1].sum() for xs in lists])
            testing.assert_within_rule(grad[1], sums, sums.double(), 5)


def both_roads(weights, lists):
    yield neulig_fast.blend_lists(weights, lists)
    yield torch.ops.neulig_fast.blend_lists(weights, [x for xs in lists for x in xs])


@on_every_backend
def test_sparse_and_negated_gradients(device, backend):
    lists, _, _ = make_lists(2, [(5, 2), (5, 2)], device=device)
    weights = normal(2, device=device).requires_grad_()
    rows = torch.tensor([0, 3, 3], device=device)
    with forcing(backend):
        for looked_up, negated in both_roads(weights, lists):
            chosen = torch.nn.functional.embedding(rows, looked_up, sparse=True)
            (got,) = torch.autograd.grad(chosen.sum(), weights, retain_graph=True)
            expected = torch.stack([xs[0][rows].sum() for xs in lists])
            testing.assert_within_rule(got, expected, expected.double(), 6)
            minus = torch._neg_view(torch.ones_like(negated))
            (got,) = torch.autograd.grad(negated, weights, minus)
            expected = torch.stack([-xs[1].sum() for xs in lists])
            testing.assert_within_rule(got, expected, expected.double(), 10)


def test_a_second_derivative_is_an_error_not_zero():
    lists, _, _ = make_lists(2, [(4,)])
    for road in range(2):

        def loss(weights, road=road):
            return list(both_roads(weights, lists))[road][0].square().sum()

        with pytest.raises(RuntimeError, match="blend_lists_weight_grad: not differentiable"):
            torch.autograd.functional.hessian(loss, normal(2))


def test_experts_must_stay_until_backward():
    lists, _, _ = make_lists(2, [(4,)])
    weights = normal(2).requires_grad_()
    (result,) = neulig_fast.blend_lists(weights, lists)
    lists[0][0].add_(1.0)
    with pytest.raises(RuntimeError, match="an expert was written to between forward and back"):
        result.sum().backward()


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "torch"])
def test_no_gradient_is_recorded_where_none_is_asked(backend):
    lists, _, _ = make_lists(2, [(4,)])
    tracked = [[x.clone().requires_grad_() for x in xs] for xs in lists]
    with forcing(backend):
        with torch.no_grad():
            (result,) = neulig_fast.blend_lists(normal(2).requires_grad_(), lists)
        assert not result.requires_grad
        assert not neulig_fast.blend_lists(normal(2), tracked)[0].requires_grad


@pytest.mark.parametrize("prepare", [False, True])
def test_compiles_to_one_graph(prepare):
    lists, _, _ = make_lists(2, [(4,), (2, 3)])
    experts = TensorLists(lists) if prepare else lists

    def loss(weights, outputs):
        with torch.no_grad():
            neulig_fast.blend_lists_(outputs, weights.detach(), experts)
        results = neulig_fast.blend_lists(weights.softmax(0), experts)
        return sum(r.square().sum() for r in results) + outputs[0].sum()

    weights = normal(2).requires_grad_()
    outputs = [torch.zeros(4), torch.zeros(2, 3)]
    expected = torch.autograd.grad(loss(weights, outputs), weights)[0]
    written = [o.clone() for o in outputs]
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    outputs = [torch.zeros(4), torch.zeros(2, 3)]
    got = torch.autograd.grad(compiled(weights, outputs), weights)[0]
    assert torch.equal(got, expected)
    assert_same(outputs, written)


def compiled(call):
    torch._dynamo.reset()
    return torch.compile(call, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "torch"])
def test_compiled_outputs_are_rounded_once(backend):
    lists, _, _ = make_lists(2, [(300,), (17,)], dtype=torch.bfloat16)
    outputs = [[torch.zeros(300), torch.zeros(17, dtype=torch.float64)] for _ in range(2)]
    with forcing(backend):
        neulig_fast.blend_lists_(outputs[0], normal(2), lists)
        compiled(neulig_fast.blend_lists_)(outputs[1], normal(2), lists)
    assert_same(*outputs)


def test_prepared_outputs_compile():
    lists, _, _ = make_lists(2, [(4,)])
    prepared, outputs = TensorLists(lists), TensorLists([[torch.zeros(4)]])
    compiled(lambda weights: neulig_fast.blend_lists_(outputs, weights, prepared))(normal(2))
    assert_same(outputs.lists[0], neulig_fast.blend_lists(normal(2), lists))


OVERLAPPING = [
    lambda w, a, b: neulig_fast.blend_lists_([a], w, [[a], [b]]),
    lambda w, a, b: neulig_fast.blend_lists_([a, a], w, [[b, b], [b, b]]),
    lambda w, a, b: neulig_fast.blend_lists_([w], w, [[b[:2]], [b[2:]]]),
    lambda w, a, b: neulig_fast.blend_lists_([a[:2]], w, [[a[1:3]], [b[2:]]]),
]


@pytest.mark.parametrize("call", OVERLAPPING)
def test_overlaps_are_refused_where_a_graph_is_traced(call):
    args = normal(2), normal(4), normal(4)
    before = [x.clone() for x in args]
    for run in (call, compiled(call)):
        with pytest.raises(Exception, match="overlap in memory"):
            run(*args)
    assert_same(args, before)
    with pytest.raises(ValueError, match="overlap in memory"):
        call(*(x.to("meta") for x in args))


def test_the_same_tensor_in_a_later_call_of_a_graph_is_refused():
    call = compiled(lambda a, b: neulig_fast.blend_lists_([a], TWO, [[b], [b]]))
    a, b = torch.zeros(3), torch.ones(3)
    call(a, b)
    with pytest.raises(Exception, match="overlap in memory"):
        call(b, b)
    assert torch.equal(a, 2 * b)


def test_the_writing_node_passes_opcheck_and_has_the_same_door():
    op = torch.ops.neulig_fast.blend_lists_.default
    outputs = [torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)]
    torch.library.opcheck(op, (outputs, TWO, [torch.ones(3), torch.ones(2)] * 2))
    with pytest.raises(ValueError, match="blend_lists_: outputs, position 0: shape"):
        op(outputs[1:], TWO, [torch.ones(3)] * 2)
    with pytest.raises(ValueError, match="blend_lists_: weights must be floating point"):
        op(outputs[:1], TWO.int(), [torch.ones(3)] * 2)
    with pytest.raises(ValueError, match="overlap in memory"):
        op(outputs[:1], TWO, [outputs[0], torch.ones(3)])


# -- errors ----------------------------------------------------------------------------------------

TWO = torch.ones(2)
WRONG = [
    (TWO, [], "N >= 1 lists of tensors, got none"),
    (TWO, torch.ones(2, 3), "lists of tensors, got a tensor for a list"),
    (TWO, [[torch.ones(3)]] * 3, r"\(N,\) or \(T, N\), here N = 3, T = 1; got \(2,\)"),
    (torch.ones(1, 1, 2), [[torch.ones(3)]] * 2, r"weights must be .* got \(1, 1, 2\)"),
    (torch.ones(2, 2), [[torch.ones(3)]] * 2, r"here N = 2, T = 1; got \(2, 2\)"),
    (torch.ones(2, dtype=torch.int64), [[torch.ones(3)]] * 2, "weights must be floating point"),
    (TWO, [[torch.ones(3)], []], "expert 1 has 0 tensors, expert 0 has 1"),
    (TWO, [[torch.ones(3)], [torch.ones(4)]], r"expert 1, position 0: shape \(4,\), expert 0"),
    (TWO, [[torch.ones(3)], [torch.ones(3).half()]], "expert 1, position 0: torch.float16, exp"),
    (TWO, [[torch.ones(3).int()]] * 2, "position 0: experts must be fp32, bf16, fp16 or fp64"),
    (TWO, [[torch.ones(4, 3)], [torch.ones(3, 4).T]], r"expert 1, position 0: not contiguous \(s"),
    (TWO, [[torch.ones(3)], [3.0]], "expert 1, position 0: a tensor is needed, got float"),
    (TWO, [[torch.ones(3)], [torch.ones(3, device="meta")]], "expert 1, position 0: on meta"),
    (TWO, [[torch.ones(3)], [torch.ones(3).to_sparse()]], "torch.sparse_coo tensor, not a dense"),
    (torch.ones(2, device="meta"), [[torch.ones(3)]] * 2, "weights must be on cpu like the exp"),
    ([0.5, 0.5], [[torch.ones(3)]] * 2, "weights must be a tensor, got list"),
    (None, [[torch.ones(3)]] * 2, "weights must be a tensor, got NoneType"),
    (TWO, None, "experts must be lists of tensors, got NoneType for a list"),
    (TWO, [torch.tensor(1.0)] * 2, "lists of tensors, got a tensor for a list"),
    (TWO, [[torch.ones(3)], [torch._neg_view(torch.ones(3))]], "expert 1, position 0: a negated"),
]  # fmt: skip


@pytest.mark.parametrize("weights, experts, message", WRONG, ids=[m for *_, m in WRONG])
def test_wrong_arguments_are_named(weights, experts, message):
    with pytest.raises(ValueError, match=f"^blend_lists: .*({message})"):
        neulig_fast.blend_lists(weights, experts)
    with pytest.raises(ValueError, match=f"(?s)^blend_lists_: .*({message})"):
        neulig_fast.blend_lists_([torch.ones(3)], weights, experts)


def test_every_mismatch_is_listed_by_expert_and_position():
    lists = [[torch.ones(3), torch.ones(2, 2), torch.ones(1)] for _ in range(3)]
    lists[1][0] = torch.ones(3).half()
    lists[2][1] = torch.ones(4)
    for call in (TensorLists, lambda experts: neulig_fast.blend_lists(torch.ones(3), experts)):
        with pytest.raises(ValueError, match="2 problems") as caught:
            call(lists)
        assert "expert 1, position 0" in str(caught.value)
        assert "expert 2, position 1" in str(caught.value)


def test_faults_of_all_arguments_are_listed():
    with pytest.raises(ValueError, match="4 problems") as caught:
        neulig_fast.blend_lists(torch.ones(5).int(), [[torch.ones(2)], [torch.ones(3)]], torch.int8)
    for words in ("expert 1, position 0", "floating point", r"here N = 2", "out_dtype"):
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="2 problems") as caught:
        torch.ops.neulig_fast.blend_lists(torch.ones(2).int(), [torch.ones(2)] * 3)
    assert "floating point" in str(caught.value) and "3 tensors" in str(caught.value)


def test_out_dtype_is_a_float():
    with pytest.raises(ValueError, match=r"out_dtype must be fp32, .* got torch.int32"):
        neulig_fast.blend_lists(TWO, [[torch.ones(3)]] * 2, torch.int32)
    with pytest.raises(ValueError, match="out_dtype must be fp32"):
        torch.ops.neulig_fast.blend_lists(TWO, [torch.ones(3)] * 2, torch.int32)


WRONG_OUTPUTS = [
    ([], "outputs must be T = 1 tensors, got 0"),
    ([torch.zeros(4)], r"outputs, position 0: shape \(4,\), the experts have \(2, 2\)"),
    ([torch.zeros(2, 4)[:, ::2]], "outputs, position 0: not contiguous"),
    ([torch.zeros(2, 2).int()], "outputs, position 0: must be fp32, bf16, fp16 or fp64, got"),
    ([torch.zeros(2, 2, device="meta")], "outputs, position 0: on meta, experts on cpu"),
    ([torch.zeros(2, 2, requires_grad=True)], r"requires grad and would be .*torch.no_grad\(\)"),
    ([None], "outputs, position 0: a tensor is needed, got NoneType"),
    ([torch._neg_view(torch.zeros(2, 2))], "outputs, position 0: a negated view"),
    (torch.zeros(1, 2, 2), "outputs must be a list of tensors, got a tensor"),
    (3, "outputs must be a list of tensors, got int"),
]


@pytest.mark.parametrize("outputs, message", WRONG_OUTPUTS, ids=[m for _, m in WRONG_OUTPUTS])
def test_wrong_outputs_are_named_and_not_written(outputs, message):
    experts = [[torch.ones(2, 2)], [torch.ones(2, 2)]]
    for given in (experts, TensorLists(experts)):
        with pytest.raises(ValueError, match=message):
            neulig_fast.blend_lists_(outputs, TWO, given)
    written = [x for x in outputs if x is not None] if isinstance(outputs, list) else []
    assert all(not x.any() for x in written if x.device.type == "cpu")


def test_weights_that_require_grad_are_not_silently_dropped():
    with pytest.raises(ValueError, match="weights require grad"):
        neulig_fast.blend_lists_([torch.zeros(3)], TWO.clone().requires_grad_(),
                                 [[torch.ones(3)]] * 2)  # fmt: skip


def test_outputs_overlap_nothing():
    buffer = torch.arange(40.0)
    before = buffer.clone()
    experts = [[buffer[:5], buffer[10:15]], [buffer[20:25], torch.ones(5)]]

    def message(*outputs):
        for given in (experts, TensorLists(experts)):
            with pytest.raises(ValueError) as caught:
                neulig_fast.blend_lists_(list(outputs), TWO, given)
            assert torch.equal(buffer, before)
        return str(caught.value)

    free = torch.zeros(5)
    assert "expert 0, position 0 and outputs, position 0" in message(buffer[4:9], free)
    assert "outputs, position 1 and expert 1, position 0" in message(free, buffer[16:21])
    assert "outputs, position 1 and expert 0, position 1 overlap" in message(*experts[0])
    twice = message(buffer[30:35], buffer[34:39])
    assert "outputs, position 0 and outputs, position 1 overlap in memory" in twice
    neulig_fast.blend_lists_([buffer[5:10], buffer[30:35]], TWO, experts)  # side by side is fine


@on_every_backend
def test_outputs_do_not_overlap_the_weights(device, backend):
    buffer = torch.arange(16.0, device=device)
    experts = TensorLists([[torch.ones(2, device=device), torch.ones(3, device=device)]] * 2)
    outputs = [buffer[4:6], buffer[8:11]]
    prepared = TensorLists([outputs])
    with forcing(backend):
        for given in (outputs, prepared):
            for start, names in ((5, "outputs, position 0 and weights"),
                                 (7, "weights and outputs, position 1")):  # fmt: skip
                neulig_fast.blend_lists_(given, buffer[:2], experts)
                before = buffer.clone()
                with pytest.raises(ValueError, match=f"{names} overlap in memory"):
                    neulig_fast.blend_lists_(given, buffer[start : start + 2], experts)
                assert torch.equal(buffer, before)
            for start in (2, 6, 11):  # side by side
                neulig_fast.blend_lists_(given, buffer[start : start + 2], experts)
        strided = buffer[2::5][:2]  # from before the first output into the second
        with pytest.raises(ValueError, match="overlap in memory"):
            neulig_fast.blend_lists_(prepared, strided, experts)


def test_function_transforms_are_an_error():
    lists, _, _ = make_lists(2, [(3,)])

    def blended(weights, lists=lists):
        return neulig_fast.blend_lists(weights, lists)[0]

    for call in (
        lambda: torch.func.grad(lambda w: blended(w).sum())(TWO),
        lambda: torch.func.vmap(blended)(torch.ones(4, 2)),
        lambda: torch.func.vmap(lambda x: blended(TWO, [[x], [x]]))(torch.ones(4, 2)),
    ):
        with pytest.raises(NotImplementedError, match=r"blend_lists: no torch\.func transforms"):
            call()
    # Nothing that is transformed is among the arguments:
    assert torch.func.vmap(lambda x: x * blended(TWO))(torch.ones(4, 3)).shape == (4, 3)


def test_forward_mode_is_an_error():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(2), torch.ones(2))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            neulig_fast.blend_lists(dual, [[torch.ones(3)]] * 2)


def test_misaligned_memory_is_refused():
    raw = bytearray(17)
    odd = torch.frombuffer(raw, dtype=torch.float32, count=4, offset=1)
    with pytest.raises(ValueError, match="expert 1, position 0: its address is no multiple"):
        neulig_fast.blend_lists(TWO, [[torch.ones(4)], [odd]])


def test_prepared_tensors_must_have_memory():
    with pytest.raises(
        ValueError, match=r"position 0: a plain .* got a Tensor on meta; blend_lists"
    ):
        TensorLists([[torch.ones(3, device="meta")]])


def test_meta_tensors_have_shapes():
    meta = [[torch.ones(3, 2, device="meta")]] * 2
    (result,) = neulig_fast.blend_lists(torch.ones(2, device="meta"), meta, torch.bfloat16)
    assert (result.shape, result.dtype, result.device.type) == ((3, 2), torch.bfloat16, "meta")


def test_forced_and_unable_is_an_error_on_both_roads():
    lists = [[torch.ones(3)]] * 2
    with neulig_fast.use_backend(blend_lists="cuda"):
        for call in (
            lambda: neulig_fast.blend_lists(TWO, lists),
            lambda: neulig_fast.blend_lists(TWO, TensorLists(lists)),
            lambda: neulig_fast.blend_lists_([torch.ones(3)], TWO, lists),
            lambda: torch.ops.neulig_fast.blend_lists(TWO, [torch.ones(3)] * 2),
        ):
            with pytest.raises(RuntimeError, match="blend_lists: backend 'cuda' was asked for"):
                call()
