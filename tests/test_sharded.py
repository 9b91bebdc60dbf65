"""DTensor arguments: what two ranks compute is what one process computes.

One launch of two ranks (gloo, CPU) runs every check below and writes what failed; pytest reads it.
"""

import json
import os
import subprocess
import sys
import traceback
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import neulig_fast as nf
from neulig_fast import testing
from neulig_fast._registry import OPS
from neulig_fast.ops import _sharded

RANKS = 2
CHECKS = {}
PLACEMENTS = ("Shard", "Replicate")
WIDTHS = (64, 33, 1, 0)  # even; uneven; an empty shard on rank 1; nothing at all


def check(function):
    CHECKS[function.__name__] = function
    return function


# -- what the ranks run ----------------------------------------------------------------------------


def mesh():
    from torch.distributed.tensor import init_device_mesh

    return init_device_mesh("cpu", (RANKS,))


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def placed(tensor, placement, dim=-1):
    """``tensor`` on both ranks: cut along ``dim``, or whole."""
    from torch.distributed import tensor as dt

    place = dt.Shard(dim % tensor.ndim) if placement == "Shard" else dt.Replicate()
    return dt.distribute_tensor(tensor, mesh(), [place])


def cases(dtype=torch.float32):
    """(weights, params, segments, placement); boundaries fall inside shards and across them."""
    for placement in PLACEMENTS:
        for width in WIDTHS:
            params = draw(3, width, dtype=dtype)
            bounds = [0, width // 5, width // 5, width - width // 3, width]
            yield draw(3, seed=1), params, None, placement
            yield draw(2, 3, seed=1), params, None, placement
            yield draw(4, 3, seed=1), params, bounds, placement
            yield draw(2, 4, 3, seed=1), params, torch.tensor(bounds), placement


def within_rule(got, op, *args):
    testing.assert_op_close(OPS[op], got, args)


@check
def blend_gives_the_bits_of_one_process_and_keeps_the_placement():
    for dtype in testing.DTYPES:
        for weights, params, segments, placement in cases(dtype):
            got = nf.blend(weights, placed(params, placement), segments)
            expected = nf.blend(weights, params, segments)
            assert got.shape == expected.shape and got.dtype == dtype
            assert [type(p).__name__ for p in got.placements] == [placement]
            assert got.placements[0].is_shard(expected.ndim - 1) == (placement == "Shard")
            assert torch.equal(got.full_tensor(), expected)


@check
def a_blend_talks_to_nobody():
    from torch.distributed.tensor.debug import CommDebugMode

    params = placed(draw(3, 33), "Shard")
    with CommDebugMode() as seen:
        nf.blend(draw(3), params)
    assert seen.get_total_counts() == 0


@check
def gradients_are_whole_on_every_rank():
    for weights, params, segments, placement in cases():
        leaf = weights.clone().requires_grad_()
        arena = placed(params, placement).requires_grad_()
        row = nf.blend(leaf, arena, segments)
        incoming = draw(*row.shape, seed=2)
        # Not .backward(): accumulation into .grad may gather what is unevenly sharded.
        got, got_arena = torch.autograd.grad(row, (leaf, arena), placed(incoming, placement))

        whole = params.clone().requires_grad_()
        nf.blend(weights, whole, segments).backward(incoming)
        bounds = None if segments is None else torch.as_tensor(segments)
        within_rule(got, "blend_weight_grad", incoming, params, bounds)
        assert got_arena.placements == arena.placements
        assert torch.equal(got_arena.full_tensor(), whole.grad)
        same_on_all_ranks(got)


@check
def replicated_weights_get_a_replicated_gradient():
    params = draw(3, 33)
    weights = placed(draw(3), "Replicate").requires_grad_()
    nf.blend(weights, placed(params, "Shard")).sum().backward()
    assert weights.grad.placements[0].is_replicate()
    within_rule(weights.grad.to_local(), "blend_weight_grad", torch.ones(33), params, None)


@check
def a_second_derivative_is_whole_too():
    params = draw(3, 33, dtype=torch.float64)

    def hessian_times_ones(arena):
        weights = draw(3, dtype=torch.float64).requires_grad_()
        loss = nf.blend(weights, arena).pow(3).sum()
        (first,) = torch.autograd.grad(loss, weights, create_graph=True)
        return torch.autograd.grad(first.sum(), weights)[0]

    got = hessian_times_ones(placed(params, "Shard"))
    torch.testing.assert_close(got, hessian_times_ones(params))


@check
def blend_weight_grad_is_the_whole_sum():
    for weights, params, segments, placement in cases():
        grad = nf.blend(weights, params, segments)
        got = nf.blend_weight_grad(placed(grad, placement), placed(params, placement), segments)
        bounds = None if segments is None else torch.as_tensor(segments)
        within_rule(got, "blend_weight_grad", grad, params, bounds)
        same_on_all_ranks(got)


@check
def offset_gram_is_the_sum_over_the_shards():
    for dtype in testing.DTYPES:
        for _, params, segments, placement in cases(dtype):
            got = nf.offset_gram(placed(params, placement), segments)
            width = params.shape[1]
            cut = -(-width // RANKS) if placement == "Shard" else width
            bounds = torch.as_tensor([0, width] if segments is None else segments)
            left = nf.offset_gram(params[:, :cut], bounds.clamp(max=cut))
            right = nf.offset_gram(params[:, cut:], bounds.clamp(min=cut) - cut)
            for tensor, *parts in zip(got, left, right, strict=True):
                assert torch.equal(tensor, sum(parts))
            if dtype == torch.float64:
                within_rule(got, "offset_gram", params, bounds)


@check
def segments_of_a_pool_fit():
    pool = nf.ExpertPool([torch.nn.Linear(5, 7) for _ in range(3)])
    torch.distributed.broadcast(pool.params, 0)
    weights = draw(2, 3)
    got = nf.blend(weights, placed(pool.params, "Shard"), pool.segments)
    assert torch.equal(got.full_tensor(), nf.blend(weights, pool.params, pool.segments))


@check
def a_mesh_of_two_dimensions_sums_over_the_one_that_cuts():
    from torch.distributed import tensor as dt

    grid = dt.init_device_mesh("cpu", (1, RANKS))
    params, weights = draw(3, 33), draw(3).requires_grad_()
    for places in ([dt.Replicate(), dt.Shard(1)], [dt.Shard(1), dt.Shard(1)]):
        row = nf.blend(weights, dt.distribute_tensor(params, grid, places))
        assert torch.equal(row.full_tensor(), nf.blend(weights, params))
        (got,) = torch.autograd.grad(row.sum(), weights)
        within_rule(got, "blend_weight_grad", torch.ones(33), params, None)


@check
def scales_are_folded_in_whichever_way_they_are_given():
    params, weights = draw(3, 33), draw(3, seed=1)
    scales, outer = draw(3, seed=2).abs(), torch.tensor(2.0)
    expected = nf.blend(weights, params, scales=scales, out_scales=outer)
    for places in ((None, None), ("Replicate", None), (None, "Replicate")):
        w, s, o = (
            t if place is None else placed(t, place)
            for t, place in zip((weights, scales, outer), (*places, places[1]), strict=True)
        )
        got = nf.blend(w, placed(params, "Shard"), scales=s, out_scales=o)
        assert torch.equal(got.full_tensor(), expected)
    refused("scales must be plain or Replicate", lambda: nf.blend(
        weights, placed(params, "Shard"), scales=placed(scales, "Shard")))  # fmt: skip
    refused("params must be a DTensor", lambda: nf.blend(
        weights, params, scales=placed(scales, "Replicate")))  # fmt: skip


@check
def parameters_that_were_overwritten_have_no_gradient():
    weights = draw(3).requires_grad_()
    for op in (lambda a: nf.blend(weights, a).to_local().square().sum(),
               lambda a: nf.blend_weight_grad(nf.blend(weights, a), a).sum()):  # fmt: skip
        arena = placed(draw(3, 33), "Shard")
        loss = op(arena)
        arena.mul_(5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@check
def parameters_overwritten_between_two_derivatives_are_noticed():
    weights, arena = draw(3).requires_grad_(), placed(draw(3, 33), "Shard")
    loss = nf.blend(weights, arena).to_local().pow(3).sum()
    (first,) = torch.autograd.grad(loss, weights, create_graph=True)
    arena.mul_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.sum().backward()


@check
def a_blend_compiles_to_one_graph():
    weights, arena = draw(3).requires_grad_(), placed(draw(3, 33), "Shard")
    compiled = torch.compile(nf.blend, backend="aot_eager", fullgraph=True)
    got, expected = compiled(weights, arena), nf.blend(weights, arena)
    assert torch.equal(got.to_local(), expected.to_local())
    got, expected = (torch.autograd.grad(x.sum().to_local(), weights)[0] for x in (got, expected))
    torch.testing.assert_close(got, expected)


@check
def ops_without_a_sharded_form_say_so():
    arena = placed(draw(3, 6), "Shard")
    refused("blend_: takes plain tensors", nf.blend_, torch.zeros(6), draw(3), arena)
    refused("blend_: takes plain tensors", nf.blend_, placed(draw(6), "Shard"), draw(3), arena)
    refused("blend_telemetry: takes plain tensors", nf.blend_telemetry, draw(3), arena)


@check
def other_placements_are_refused():
    from torch.distributed import tensor as dt

    rows = placed(draw(4, 6), "Shard", dim=0)
    parts = dt.DTensor.from_local(draw(4, 6), mesh(), [dt.Partial()])
    good = placed(draw(4, 6), "Shard")
    refused("Shard\\(dim=0\\).*redistribute", nf.blend, draw(4), rows)
    refused("Partial", nf.blend, draw(4), parts)
    refused("Shard\\(dim=0\\)", nf.offset_gram, rows)
    refused("weights must be plain or Replicate", nf.blend, placed(draw(4), "Shard"), good)
    refused("params must be a DTensor", nf.blend, placed(draw(4), "Replicate"), draw(4, 6))
    refused("grad must be a DTensor.*plain tensor", nf.blend_weight_grad, draw(6), good)
    refused("Shard\\(dim=0\\).*got \\(Replicate", nf.blend_weight_grad,
            placed(draw(6), "Replicate"), good)  # fmt: skip


@check
def what_is_wrong_with_the_whole_is_said_on_every_rank():
    good = placed(draw(4, 6), "Shard")
    refused("here N = 4; got \\(3,\\)", nf.blend, draw(3), good)
    refused("from 0 to P = 6, got \\[0, 2\\]", nf.blend, draw(1, 4), good, [0, 2])
    refused("from 0 to P = 6, got \\[0, 2\\]", nf.offset_gram, good, torch.tensor([0, 2]))


@check
def a_layout_gives_any_tensor_its_place_back():
    for tensor in (placed(draw(5, 3), "Shard", dim=0), placed(draw(3), "Replicate")):
        layout = _sharded.Layout.of(tensor)
        back = layout.wrap(tensor.to_local() * 2)
        assert back.placements == tensor.placements
        assert torch.equal(back.full_tensor(), 2 * tensor.full_tensor())


@check
def lists_are_blended_where_they_lie():
    shapes, dims = ((5, 3), (4,), (2, 7), ()), (0, 0, 1, None)
    lists = [[draw(*s, seed=10 * i + t) for t, s in enumerate(shapes)] for i in range(3)]

    def place(tensor, dim):
        return placed(tensor, "Replicate") if dim is None else placed(tensor, "Shard", dim)

    cut = [[place(x, dim) for x, dim in zip(xs, dims, strict=True)] for xs in lists]
    for shape in ((3,), (4, 3)):
        weights = draw(*shape).requires_grad_()
        got, expected = nf.blend_lists(weights, cut), nf.blend_lists(weights, lists)
        for blended, tensor, whole in zip(got, cut[0], expected, strict=True):
            assert blended.placements == tensor.placements
            assert torch.equal(blended.full_tensor(), whole)
        (grad,) = torch.autograd.grad(sum(x.full_tensor().square().sum() for x in got), weights)
        (exact,) = torch.autograd.grad(sum(x.square().sum() for x in expected), weights)
        torch.testing.assert_close(grad, exact)
        same_on_all_ranks(grad)
        into = [place(torch.zeros(s), dim) for s, dim in zip(shapes, dims, strict=True)]
        assert nf.blend_lists_(into, weights.detach(), cut) is into
        for tensor, whole in zip(into, expected, strict=True):
            assert torch.equal(tensor.full_tensor(), whole)


@check
def lists_that_lie_apart_are_refused():
    from torch.distributed import tensor as dt

    rows, columns = placed(draw(4, 2), "Shard", 0), placed(draw(4, 2), "Shard", 1)
    parts = dt.DTensor.from_local(draw(4, 2), mesh(), [dt.Partial()])
    run, into = nf.blend_lists, nf.blend_lists_
    refused("expert 1, position 0: placed as .*dim=1", run, draw(2), [[rows], [columns]])
    refused("as a plain tensor, expert 0 as", run, draw(2), [[rows], [draw(4, 2)]])
    refused("position 0: sums not yet reduced", run, draw(2), [[parts], [parts]])
    plain = draw(4, 2)
    refused("blend_lists_: outputs, position 0: placed as a plain tensor, expert 0 as \\(Shard",
            into, [plain], draw(2), [[rows], [rows]])  # fmt: skip
    refused("outputs, position 0: placed as .*dim=1", into, [columns], draw(2), [[rows], [rows]])
    for experts in ([[plain], [plain]], nf.TensorLists([[plain], [plain]])):
        refused("outputs, position 0: a DTensor, the exp", into, [rows], draw(2), experts)
        weights = placed(draw(2), "Replicate")
        refused("weights are a DTensor, the experts plain tensors", run, weights, experts)
        refused("weights are a DTensor, the exp", into, [draw(4, 2)], weights, experts)
    refused("expert 0, position 0: a plain tensor .* got a DTensor", nf.TensorLists, [[rows]] * 2)


@check
def writes_to_listed_dtensors_are_counted():
    experts = [[placed(draw(4, 2, seed=i), "Shard", 0)] for i in range(2)]
    weights = draw(2).requires_grad_()
    (result,) = nf.blend_lists(weights, experts)
    (kept,) = nf.blend_lists(weights, experts)
    kept.to_local().sum().backward()
    experts[0][0].mul_(5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.to_local().sum().backward()
    factor, output = draw(4, 2).requires_grad_(), placed(draw(4, 2), "Shard", 0)
    product = placed(factor, "Shard", 0) * output
    nf.blend_lists_([output], draw(2), experts)
    assert output._version > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.to_local().sum().backward()


@check
def averages_move_where_they_lie():
    start, end = draw(5, 4), draw(5, 4, seed=1)
    expected = [start.clone()]
    nf.ema_multi_avg_fn(0.9)(expected, [end], 1)
    for placement in PLACEMENTS:
        average, model = placed(start, placement, 0), placed(end, placement, 0)
        nf.ema_multi_avg_fn(0.9)([average], [model], torch.tensor(1))
        assert torch.equal(average.full_tensor(), expected[0])
        average = placed(start.bfloat16(), placement, 0)
        random = nf.ema_multi_avg_fn(0.9, rounding="stochastic")
        refused("rounded to nearest", random, [average], [average], 1)
    rows, columns = placed(start, "Shard", 0), placed(end, "Shard", 1)
    refused("position 0: placed as .*dim=1", nf.lerp_lists_, [columns], [rows], 0.5)
    refused("as a plain tensor", nf.lerp_lists_, [rows], [end], 0.5)
    refused("lerp_lists: a DTensor among plain tensors", nf.lerp_lists, [rows], [end], 0.5)


def same_on_all_ranks(tensor):
    everyone = [torch.empty_like(tensor) for _ in range(RANKS)]
    torch.distributed.all_gather(everyone, tensor.contiguous())
    assert all(torch.equal(a, b) for a, b in pairwise(everyone))


def refused(words, function, *args):
    with pytest.raises(ValueError, match=f"(?s){words}"):
        function(*args)


def main(folder):
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    failed = {}
    for name, function in CHECKS.items():
        try:
            function()
        except (Exception, pytest.fail.Exception):  # noqa: BLE001 (failures are for pytest to show)
            failed[name] = traceback.format_exc()
    rank = torch.distributed.get_rank()
    Path(folder, f"rank{rank}.json").write_text(json.dumps(failed))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # destructors at exit may find a thread of gloo's running, and abort


# -- what pytest runs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def failures(once):
    """Per rank, the checks that failed, with their tracebacks."""

    def launch(folder):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        result = subprocess.run(
            [*launch, f"--nproc-per-node={RANKS}", __file__, str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr[-4000:]

    folder = once("ranks", launch)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(failures, name):
    for rank, failed in enumerate(failures):
        assert name not in failed, f"rank {rank}\n{failed[name]}"


def test_plain_tensors_do_not_load_the_dtensor_module(python):
    code = (
        "import sys, torch, neulig_fast as nf\n"
        "nf.blend(torch.ones(2), torch.nn.Parameter(torch.ones(2, 3)))\n"
        "print('torch.distributed.tensor' in sys.modules)"
    )
    result = python(code)
    assert result.stdout.strip() == "False", result.stdout + result.stderr


if __name__ == "__main__":
    main(sys.argv[1])
