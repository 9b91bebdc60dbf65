"""How Triton kernels are launched, and what is left of them where Triton is not installed."""

import itertools

import pytest

from neulig_fast import testing
from neulig_fast.kernels import _launch, _tiles
from neulig_fast.kernels._launch import config
from neulig_fast.kernels._segments import search_steps


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize(
    "op",
    [
        *("blend", "blend_lists", "blend_lists_weight_grad", "lerp_lists"),
        *("blend_telemetry", "blend_weight_grad", "offset_gram"),
        *("gram", "magnitude_histogram", "magnitude_select", "magnitude_sums"),
        *("neulig_fit", "neulig_loss", "neulig_loss_backward"),
    ],
)
def test_configurations_are_possible(op, dtype):
    for n in range(1, 65):
        for k in (1, 2, 3, 8):
            c = config(op, dtype, n, k)
            assert c.block & (c.block - 1) == 0
            if op.startswith("neulig"):
                assert 16 <= c.lanes <= c.block and n <= c.experts < 2 * n
                continue
            assert c.block >= 32 * c.num_warps
            if op == "blend":
                assert c.held == n or (k == 1 and (n - c.held) % 8 == 0 and 1 <= c.held <= 8)
            elif op == "blend_telemetry":
                assert n % c.held == 0 and 1 <= c.held <= 8
            elif op == "blend_weight_grad":
                assert c.block % c.lanes == 0 and 1 <= c.experts <= 8 and 1 <= c.held <= 8
    with pytest.raises(ValueError, match="'blond' has no kernel"):
        config("blond", dtype, 1, 1)


def power_of_2(n):
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("tf32", [False, True])
def test_tiles_of_layers_are_possible(dtype, tf32):
    for rows, columns in itertools.product((1, 16, 17, 64, 65, 5000), (1, 64, 65, 4096)):
        for unit, sums, large in itertools.product((1, 4, 16), (1, 2), (False, True)):
            t = _tiles.product_tile(dtype, rows, columns, unit, tf32=tf32, sums=sums, large=large)
            assert all(map(power_of_2, (t.rows, t.columns, t.depth, t.num_warps)))
            assert 16 <= t.rows <= 128 and t.depth >= 16  # what tensor cores multiply
            sum_registers = sums * t.rows * t.columns * max(dtype.itemsize, 4) // 4
            assert sum_registers <= 128 * 32 * t.num_warps  # half of what a thread has
            staged = t.stages * (t.rows + t.columns) * t.depth * dtype.itemsize
            assert staged <= 100_000  # of an A100's 163 KiB
    for width in (2**k for k in range(15)):
        for rows in (1, 2, 50, 257):
            held, num_warps = _tiles.norm_rows(dtype, width, rows)
            assert power_of_2(held) and power_of_2(num_warps) and num_warps <= 16
            assert held < 2 * rows and (held == 1 or held * width <= 4096)


def test_merging_first_pays_for_many_rows_of_many_experts():
    for dtype in testing.DTYPES:
        for tf32 in (False, True):
            pays = [_tiles.merges_first(dtype, rows, 5, tf32=tf32) for rows in range(200)]
            assert pays == sorted(pays) and not pays[1] and pays[-1]  # once it pays, it does
            assert not _tiles.merges_first(dtype, 10**6, 1, tf32=tf32)  # one expert is merged


def test_alignment_and_search_steps():
    assert [_launch.alignment(s) for s in (0, 1, 6, 8, 32, 48, 2**40)] == [16, 1, 2, 8, 16, 16, 16]
    for segments in (*range(1, 70), 1023, 1024, 1025):
        steps = search_steps(segments)
        assert 32**steps >= segments and (steps == 0 or 32 ** (steps - 1) < segments)


def test_kernels_can_be_imported_without_triton(python):
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from neulig_fast.kernels import blend, blend_weight_grad\n"
        "print(blend.why_not(torch.ones(2), torch.ones(2, 3)))\n"
        "try: blend.blend_kernel[(1,)]()\n"
        "except RuntimeError as error: print(error)\n"
        "try: blend_weight_grad.blend_weight_grad(torch.ones(3), torch.ones(2, 3))\n"
        "except ValueError as error: print(error)\n"
    )
    done = python(code, TRITON_INTERPRET="0")
    assert done.stdout.count("triton cannot be imported") == 3, done.stdout + done.stderr
