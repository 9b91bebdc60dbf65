"""blend beyond what every op is tested for in test_house.py: closed forms, bits, sizes, errors."""

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neulig_fast
from neulig_fast import _registry, testing
from neulig_fast._registry import OPS
from neulig_fast.ops import _arena

BACKENDS = testing.backends_of(OPS["blend"])
on_every_backend = pytest.mark.parametrize("device, backend", BACKENDS)
in_every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)


def run(backend, *args):
    with neulig_fast.use_backend(blend=backend):
        return neulig_fast.blend(*args)


def normal(*shape, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


# -- closed forms ----------------------------------------------------------------------------------


@in_every_dtype
@on_every_backend
def test_one_hot_weights_return_the_expert_exactly(device, backend, dtype):
    params = normal(5, 1025, device=device, dtype=dtype)
    assert torch.equal(run(backend, torch.eye(5, device=device), params), params)


@in_every_dtype
@on_every_backend
def test_constants_with_dyadic_weights_are_exact(device, backend, dtype):
    params = torch.full((4, 130), 1.5, device=device, dtype=dtype)
    weights = torch.tensor([0.5, 0.25, 0.125, 0.125], device=device)
    assert torch.equal(run(backend, weights, params), params[0])


@on_every_backend
def test_k_outputs_equal_k_calls_bit_for_bit(device, backend):
    params, weights = normal(6, 3000, device=device), normal(8, 6, device=device, seed=1)
    together = run(backend, weights, params)
    for row, w in zip(together, weights, strict=True):
        assert torch.equal(row, run(backend, w, params))


@on_every_backend
def test_segments_equal_separate_blends_bit_for_bit(device, backend):
    params, bounds = normal(3, 500, device=device), [0, 0, 3, 35, 36, 420, 500]
    weights = normal(2, len(bounds) - 1, 3, device=device, seed=1)
    whole = run(backend, weights, params, bounds)
    for s, (start, stop) in enumerate(pairwise(bounds)):
        part = params[:, start:stop].contiguous()
        assert torch.equal(whole[:, start:stop], run(backend, weights[:, s], part))


@on_every_backend
def test_one_segment_is_no_segment(device, backend):
    params, weights = normal(4, 777, device=device), normal(4, device=device, seed=1)
    assert torch.equal(run(backend, weights[None], params, [0, 777]), run(backend, weights, params))


@on_every_backend
def test_permuting_experts_with_their_weights_changes_rounding_only(device, backend):
    params, weights = normal(7, 400, device=device), normal(7, device=device, seed=1)
    order = torch.randperm(7)
    oracle = OPS["blend"].reference(weights.double(), params.double())
    working = OPS["blend"].reference(weights, params)
    testing.assert_within_rule(run(backend, weights[order], params[order]), working, oracle)


# -- bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64])
@on_every_backend
def test_every_number_of_experts_gives_the_chains_bits(device, backend, experts):
    params, weights = normal(experts, 301, device=device), normal(experts, device=device, seed=1)
    chain = weights[0] * params[0]
    for i in range(1, experts):
        chain = chain + weights[i] * params[i]
    assert torch.equal(run(backend, weights, params), chain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on_every_backend
def test_half_precision_is_one_rounding_of_the_fp32_chain(device, backend, dtype):
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates fp32 to bf16; the house test bounds it")
    params, weights = normal(5, 4099, device=device, dtype=dtype), normal(5, device=device, seed=1)
    expected = run(backend, weights, params.float()).to(dtype)
    assert torch.equal(run(backend, weights, params), expected)


@in_every_dtype
@on_every_backend
def test_extreme_values_pass_through(device, backend, dtype):
    info = torch.finfo(dtype)
    row = [float("nan"), float("inf"), -float("inf"), info.max, info.tiny, info.smallest_normal]
    params = torch.tensor([row, [1.0] * 6], device=device, dtype=dtype)
    kept = run(backend, torch.tensor([1.0, 0.0], device=device), params)
    assert torch.equal(kept.nan_to_num(0.5, 7.0, -7.0), params[0].nan_to_num(0.5, 7.0, -7.0))
    dropped = run(backend, torch.tensor([0.0, 1.0], device=device), params)
    assert dropped[:3].isnan().all() and torch.equal(dropped[3:], params[1, 3:])


@in_every_dtype
@on_every_backend
def test_overflow_becomes_infinity(device, backend, dtype):
    params = torch.full((2, 5), torch.finfo(dtype).max, device=device, dtype=dtype)
    assert run(backend, torch.tensor([1.0, 1.0], device=device), params).eq(float("inf")).all()


@on_every_backend
def test_strided_rows_and_odd_starts(device, backend):
    base = normal(4, 2000, device=device)
    weights = normal(4, device=device, seed=1)
    for start, stop in [(0, 1999), (1, 2000), (3, 1028), (5, 6), (7, 7)]:
        view = base[:, start:stop]
        assert torch.equal(run(backend, weights, view), run(backend, weights, view.contiguous()))
    skipping = base[::2]
    assert torch.equal(
        run(backend, weights[:2], skipping), run(backend, weights[:2], skipping.contiguous())
    )


@on_every_backend
def test_rows_further_apart_than_two_to_the_31_elements(device, backend):
    stride = 2**31 + 64
    # Eight gigabytes of addresses, of which four pages are touched.
    buffer = torch.empty(stride + 1000, device=device)
    params = buffer.as_strided((2, 1000), (stride, 1))
    params[0], params[1] = 1.0, torch.arange(1000.0, device=device)
    expected = 1.0 + 2 * torch.arange(1000.0, device=device)
    assert torch.equal(run(backend, torch.tensor([1.0, 2.0], device=device), params), expected)


def test_columns_that_are_not_contiguous_are_taken_by_the_reference(monkeypatch):
    params = normal(50, 3).T
    monkeypatch.setattr(_registry, "_warned", set())
    with pytest.warns(neulig_fast.NeuligFastWarning, match=r"runs on the 'torch'.*(contig|built)"):
        got = neulig_fast.blend(torch.ones(3), params)
    assert torch.equal(got, run("torch", torch.ones(3), params.contiguous()))


THREADS = """
import hashlib, torch, neulig_fast
g = torch.Generator().manual_seed(0)
digests = [hashlib.sha256(), hashlib.sha256()]
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    params = torch.randn(5, 1_000_003, generator=g).to(dtype)
    weights = torch.randn(2, 3, 5, generator=g)
    bounds = [0, 100_001, 900_000, 1_000_003]
    for threads, digest in enumerate(digests, 1):
        torch.set_num_threads(threads)
        out = neulig_fast.blend(weights, params, bounds)
        grad = neulig_fast.blend_weight_grad(out, params, bounds)
        digest.update(out.view(torch.uint8).numpy().tobytes() + grad.numpy().tobytes())
print(*(digest.hexdigest() for digest in digests))
"""


needs_native = pytest.mark.skipif(
    OPS["blend"].why_not("cpu", "cpu") is not None, reason="the C++ extension is not built"
)


@needs_native
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_outputs_too_large_for_the_caches_have_the_same_bits(dtype):
    width = (32 << 20) // dtype.itemsize // 2 + 77  # two outputs pass the threshold of streaming
    params = normal(3, width + 3, dtype=dtype)[:, 3:]
    weights, bounds = normal(2, 3, 3, seed=1), [0, 5, width - 9, width]
    assert torch.equal(run("cpu", weights, params, bounds), run("torch", weights, params, bounds))


@needs_native
def test_an_output_between_two_items_may_stream():
    """Large outputs are streamed past the caches, which needs addresses that this one lacks."""
    width = (32 << 20) // 4 + 64
    memory = torch.zeros(4 * width + 2, dtype=torch.uint8).numpy()
    out = torch.frombuffer(memory, dtype=torch.float32, count=width, offset=2)
    params, weights = normal(2, width), normal(2, seed=1)
    with neulig_fast.use_backend("cpu"):
        neulig_fast.blend_(out, weights, params)
    assert out.data_ptr() % 4 == 2
    assert torch.equal(out, run("torch", weights, params))


@needs_native
@pytest.mark.parametrize("experts", [65, 100])
def test_the_cpu_takes_any_number_of_experts(experts):
    params, weights = normal(experts, 333), normal(experts, seed=1)
    assert torch.equal(run("cpu", weights, params), run("torch", weights, params))


@needs_native
def test_one_and_two_threads_and_every_instruction_set_give_the_same_bits(python):
    levels = ("0", "3", "")  # the last: the best there is
    runs = [python(THREADS, NEULIG_FAST_BACKEND="cpu", NEULIG_FAST_CPU=level) for level in levels]
    able = [r for r in runs if "NEULIG_FAST_CPU" not in r.stderr]  # an older CPU lacks a level
    assert all(r.returncode == 0 for r in able), [r.stderr for r in able]
    assert len(able) >= 2 and len({digest for r in able for digest in r.stdout.split()}) == 1


# -- gradients -------------------------------------------------------------------------------------


@on_every_backend
def test_backward_of_backward(device, backend):
    weights = normal(2, 3, device=device, dtype=torch.float64).requires_grad_()
    params = normal(3, 7, device=device, dtype=torch.float64, seed=1).requires_grad_()
    with neulig_fast.use_backend(backend):
        assert torch.autograd.gradgradcheck(neulig_fast.blend, (weights, params))


def test_gradient_of_an_expanded_scalar():
    weights = torch.tensor([0.25, 0.75], requires_grad=True)
    params = torch.arange(6.0).view(2, 3).requires_grad_()
    neulig_fast.blend(weights, params).sum().backward()
    assert torch.equal(weights.grad, params.detach().sum(1))
    assert torch.equal(params.grad, weights.detach()[:, None].expand(2, 3))


@pytest.mark.parametrize("asked", ["weights", "params"])
def test_only_the_asked_gradient_is_computed(asked, monkeypatch):
    called = []
    for op in OPS.values():
        runs = {b: dataclasses.replace(i, run=spy(i.run, op, called)) for b, i in op.impls.items()}
        monkeypatch.setattr(op, "impls", runs)
    weights = torch.ones(2, requires_grad=asked == "weights")
    params = torch.ones(2, 3, requires_grad=asked == "params")
    neulig_fast.blend(weights, params).sum().backward()
    assert called == ["blend", {"weights": "blend_weight_grad", "params": "blend"}[asked]]


def spy(run, op, called):
    def record(*args):
        called.append(op.name)
        return run(*args)

    return record


def test_compiles_with_inductor_through_a_graph_of_other_ops():
    def loss(weights, params):
        return neulig_fast.blend(weights.softmax(0), params).square().sum()

    weights, params = normal(3).requires_grad_(), normal(3, 65, seed=1)
    expected = torch.autograd.grad(loss(weights, params), weights)[0]
    torch._dynamo.reset()
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(weights, params), weights)[0]
    torch.testing.assert_close(got, expected)


# -- errors ----------------------------------------------------------------------------------------

WRONG = [
    ((torch.ones(2), torch.ones(3, 4, 5)), r"blend: params must be \(N, P\).*got \(3, 4, 5\)"),
    ((torch.ones(0), torch.ones(0, 4)), r"params must be \(N, P\) with N >= 1"),
    ((torch.ones(3), torch.ones(2, 4)), r"here N = 2; got \(3,\)"),
    ((torch.ones(1, 1, 2), torch.ones(2, 4)), r"\(N,\) or \(K, N\), with segments \(S, N\) or"),
    ((torch.ones(2), torch.ones(2, 4), [0, 4]), r"here N = 2, S = 1; got \(2,\)"),
    ((torch.ones(2, dtype=torch.int64), torch.ones(2, 4)), r"weights must be floating point"),
    ((torch.ones(2), torch.ones(2, 4, dtype=torch.int32)), r"params must be fp32, bf16, fp16"),
    ((torch.ones(1, 2), torch.ones(2, 4), torch.tensor([0.0, 4.0])), r"segments must be int64"),
    ((torch.ones(1, 2), torch.ones(2, 4), [0, 5]), r"segments must ascend from 0 to P = 4"),
    ((torch.ones(2, 2), torch.ones(2, 4), [0, 3, 2]), r"segments must ascend from 0 to P = 4"),
    ((torch.ones(2, 2), torch.ones(2, 4), [1, 3, 4]), r"segments must ascend from 0 to P = 4"),
    ((torch.ones(2, device="meta"), torch.ones(2, 4)), r"weights must be on cpu like params"),
    ((torch.ones(2), torch.ones(2, 4), []), r"segments must be \(S \+ 1,\) boundaries"),
]


@pytest.mark.parametrize("args, message", WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        neulig_fast.blend(*args)


def test_boundaries_are_integers():
    with pytest.raises(TypeError, match="float"):
        neulig_fast.blend(torch.ones(2, 2), torch.ones(2, 4), [0, 1.9, 4])


OF_ANOTHER_TYPE = [
    (neulig_fast.blend, ([0.5, 0.5], torch.ones(2, 4)), "weights must be a tensor, got list"),
    (neulig_fast.blend, (None, None), "2 problems.*params must be .*got NoneType"),
    (neulig_fast.blend, (torch.ones(1, 2), torch.ones(2, 4), 4), "segments must be a sequence of"),
    (neulig_fast.blend, (torch.ones(2), torch.ones(2, 4), None, "half"), "must be a torch.dtype"),
    (neulig_fast.blend, (torch.ones(2), torch.ones(2, 4), None, torch.half, "1"), "got '1'"),
    (neulig_fast.blend_telemetry, (torch.ones(2).numpy(), torch.ones(2, 4)), "got ndarray"),
    (neulig_fast.blend_telemetry, (torch.ones(2), torch.ones(2, 4), None, None, 1.0), "base must"),
    (neulig_fast.blend_weight_grad, (None, torch.ones(2, 4)), "grad must be a tensor"),
    (neulig_fast.offset_gram, ([[1.0]],), "params must be a tensor, got list"),
]


@pytest.mark.parametrize("op, args, message", OF_ANOTHER_TYPE, ids=[m for *_, m in OF_ANOTHER_TYPE])
def test_arguments_of_another_type_are_named(op, args, message):
    with pytest.raises(TypeError, match=f"(?s)^{op.__name__}: .*{message}"):
        op(*args)


def test_sparse_arguments_are_refused():
    rows, sparse = torch.ones(2, 4), torch.ones(2, 4).to_sparse()
    for op, args, name in (
        (neulig_fast.blend, (torch.ones(2), sparse), "params"),
        (neulig_fast.blend, (torch.ones(2).to_sparse(), rows), "weights"),
        (neulig_fast.blend, (torch.ones(1, 2), rows, torch.tensor([0, 4]).to_sparse()), "segments"),
        (neulig_fast.blend_telemetry, (torch.ones(2), sparse), "params"),
        (neulig_fast.blend_weight_grad, (sparse, rows), "grad"),
        (neulig_fast.offset_gram, (torch.ones(2, 4).to_sparse_csr(),), "params"),
    ):
        with pytest.raises(ValueError, match=f"{op.__name__}: {name} must be dense"):
            op(*args)


def test_boundaries_in_python_compile_and_are_checked():
    def f(weights, params):
        return neulig_fast.blend(weights, params, [0, 3, params.shape[1]])

    torch._dynamo.reset()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    weights, params = normal(2, 3), normal(3, 65, seed=1)
    assert torch.equal(compiled(weights, params), f(weights, params))


def test_boundaries_do_not_go_to_the_default_device():
    weights, params = torch.ones(2, 2), normal(2, 4)
    with torch.device("meta"):
        got = neulig_fast.blend(weights, params, [0, 3, 4])
    assert torch.equal(got, params.sum(0))


def test_tensors_that_no_gpu_could_read_are_named():
    odd = torch.frombuffer(bytearray(21), dtype=torch.float32, offset=1, count=4)
    message = "grad starts at an address that is not a multiple of its item size, 4 bytes"
    assert _arena.misaligned(("params", "grad"), (torch.ones(3), odd, None)) == [message]


def test_segments_of_other_rows_are_refused():
    pool = neulig_fast.ExpertPool([{"a": torch.ones(3)}, {"a": torch.ones(3)}])
    with pytest.raises(ValueError, match="segments are of rows of 32, params have P = 4"):
        neulig_fast.blend(torch.ones(1, 2), torch.ones(2, 4), pool.segments)


def test_every_mismatch_is_listed():
    with pytest.raises(ValueError) as caught:
        neulig_fast.blend(torch.ones(3, dtype=torch.int64), torch.ones(2, 4, dtype=torch.int32))
    assert "3 problems" in str(caught.value)


# -- properties ------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 9),
    k=st.integers(0, 3),
    cuts=st.lists(st.integers(0, 97), max_size=6),
    seed=st.integers(0, 1000),
)
def test_any_shape_agrees_with_an_einsum_over_columns(n, k, cuts, seed):
    bounds = [0, *sorted(cuts), 97]
    params = normal(n, 97, dtype=torch.float64, seed=seed)
    weights = normal(k, len(bounds) - 1, n, dtype=torch.float64, seed=seed + 1)
    owner = torch.bucketize(torch.arange(97), torch.tensor(bounds[1:-1]), right=True)
    expected = torch.einsum("kpi,ip->kp", weights[:, owner], params)
    torch.testing.assert_close(neulig_fast.blend(weights, params, bounds), expected)
