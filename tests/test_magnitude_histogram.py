"""magnitude_histogram beyond test_house.py: by hand, prefixes, tiles, NaN, threads, errors."""

import numpy as np
import pytest
import torch

import neulig_fast
from neulig_fast import testing
from neulig_fast._registry import OPS
from neulig_fast.ops._digits import BINS, DIGITS

OP = OPS["magnitude_histogram"]
BACKENDS = testing.backends_of(OP)
on_every_backend = pytest.mark.parametrize("device, backend", BACKENDS)
in_every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
needs_cpu = pytest.mark.skipif(("cpu", "cpu") not in BACKENDS, reason="no native cpu backend")


def run(backend, params, prefix, digit, base=None):
    prefix = torch.tensor(prefix, device=params.device)
    with neulig_fast.use_backend(magnitude_histogram=backend):
        return neulig_fast.magnitude_histogram(params, prefix, digit, base)


def normal(*shape, device="cpu", dtype=torch.float32, seed=0):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(device, dtype)


def bits_of(values):
    """The bits of magnitudes, from what NumPy holds of them; NaN is left out."""
    wide = values.cpu().double().numpy() if values.dtype == torch.float64 else None
    wide = values.cpu().float().numpy() if wide is None else wide
    wide = np.abs(wide[~np.isnan(wide)])
    return wide.view(np.int64 if wide.dtype == np.float64 else np.int32).astype(np.int64)


def exact(row, prefix, digit):
    """One element after the other, in Python's integers."""
    shift, width = DIGITS[64 if row.dtype == torch.float64 else 32][digit]
    counts = [0] * BINS
    for bits in bits_of(row).tolist():
        if bits >> (shift + width) == prefix:
            counts[(bits >> shift) % 2**width] += 1
    return counts


def test_digits_cover_the_bits_once():
    for size, bits in ((32, 31), (64, 63)):
        top = bits
        for shift, width in DIGITS[size]:
            assert shift + width == top and 2**width <= BINS
            top = shift
        assert top == 0


@on_every_backend
def test_by_hand(device, backend):
    params = torch.tensor([[1.0, -1.0, 1.125, 2.0, torch.inf, torch.nan, 0.0]], device=device)
    counts = run(backend, params, [0], 0)[0]
    # An exponent and three bits of the mantissa: 127 << 3 is 1.
    found = {v: counts[v].item() for v in counts.nonzero().flatten().tolist()}
    assert found == {127 << 3: 2, (127 << 3) + 1: 1, 128 << 3: 1, 255 << 3: 1, 0: 1}
    assert run(backend, params, [127 << 3], 1)[0].nonzero().flatten().tolist() == [0]
    assert run(backend, params - 1, [0], 0)[0, 0] == 1


@in_every_dtype
@on_every_backend
def test_every_digit_counts_what_python_counts(device, backend, dtype):
    params = normal(2, 2500, device=device, dtype=dtype)
    params[:, :1000] = params[:, 7:8]
    bits = [bits_of(params[i, 7:8])[0].item() for i in range(2)]
    for digit, (shift, width) in enumerate(DIGITS[64 if dtype == torch.float64 else 32]):
        prefix = [b >> (shift + width) for b in bits]
        got = run(backend, params, prefix, digit)
        assert got.sum(1).min() >= 1000
        for row, above, counts in zip(params, prefix, got.tolist(), strict=True):
            assert counts == exact(row, above, digit)


@in_every_dtype
@on_every_backend
def test_prefixes_that_no_magnitude_has(device, backend, dtype):
    params = torch.zeros(6, 100, device=device, dtype=dtype)
    params[:, 50:] = torch.nan
    for digit in (1, 2):
        got = run(backend, params, [-1, 0, 1, 1 << 32, -(1 << 63), (1 << 63) - 1], digit)
        assert got[:, 0].tolist() == [0, 50, 0, 0, 0, 0] and not got[:, 1:].any()
    got = run(backend, params, [0, 1, -1, 2, 1 << 31, 1 << 62], 0)
    assert got.sum(1).tolist() == [50, 0, 0, 0, 0, 0]


@on_every_backend
def test_nan_is_not_counted_and_infinity_is(device, backend):
    params = torch.tensor([[torch.nan, -torch.nan, torch.inf, -torch.inf, 1.0]], device=device)
    assert run(backend, params, [0], 0).sum() == 3
    infinity = 0x7F800000
    assert run(backend, params, [infinity >> 20], 1)[0, 0] == 2
    assert run(backend, params, [infinity >> 10], 2)[0, 0] == 2
    assert run(backend, params, [(infinity >> 10) + 1], 2).sum() == 0  # only NaN has such bits


@in_every_dtype
@on_every_backend
def test_tiles_add_up_and_bases_are_subtracted(device, backend, dtype):
    P = 5000 if (backend, device) == ("triton", "cpu") else 70_001
    params, base = normal(2, P, device=device, dtype=dtype), normal(P, dtype=dtype, seed=1)
    base = base.to(device)
    whole = run(backend, params, [0, 0], 0, base)
    assert whole.sum(1).tolist() == [P, P]
    parts = [run(backend, params[:, a:b], [0, 0], 0, base[a:b]) for a, b in ((0, 1001), (1001, P))]
    assert torch.equal(sum(parts), whole)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(run(backend, params.to(wide) - base.to(wide), [0, 0], 0), whole)


@on_every_backend
def test_nothing_to_count(device, backend):
    got = run(backend, torch.empty(2, 0, device=device), [0, 0], 0)
    assert got.shape == (2, BINS) and not got.any()


@needs_cpu
def test_results_do_not_depend_on_threads():
    params, threads, seen = normal(3, 300_001, dtype=torch.bfloat16), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            seen.append(run("cpu", params, [0, 0, 0], 0))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert seen[0].sum(1).tolist() == [300_001] * 3


# -- errors ---------------------------------------------------------------------------------------

ZEROS = torch.tensor([0, 0])


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.ones(3), ZEROS, 0), r"params must be \(N, P\) with N >= 1, got \(3,\)"),
        ((torch.ones(2, 3), ZEROS[:1], 0), r"prefix must be \(N,\) = \(2,\), got \(1,\)"),
        ((torch.ones(2, 3), ZEROS.float(), 0), "prefix must be int64, got torch.float32"),
        ((torch.ones(2, 3), ZEROS, 3), "digit must be 0 to 2 for torch.float32, got 3"),
        ((torch.ones(2, 3).double(), ZEROS, 6), "digit must be 0 to 5 for torch.float64, got 6"),
        ((torch.ones(2, 3), ZEROS, -1), "digit must be 0 to 2"),
        ((torch.ones(2, 3), ZEROS, 0, torch.ones(2)), r"base must be \(P,\) = \(3,\), got \(2,\)"),
    ],
)
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=f"magnitude_histogram: (.|\n)*{message}"):
        neulig_fast.magnitude_histogram(*args)


def test_arguments_of_another_type_are_named():
    with pytest.raises(TypeError, match="prefix must be a tensor, got list"):
        neulig_fast.magnitude_histogram(torch.ones(2, 3), [0, 0], 0)
    with pytest.raises(TypeError, match=r"digit must be an int, got 1\.0"):
        neulig_fast.magnitude_histogram(torch.ones(2, 3), ZEROS, 1.0)


@needs_cpu
@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.ones(3), ZEROS, 0), r"params must be \(N, P\)"),
        ((torch.ones(2, 3), ZEROS.int(), 0), "prefix must be contiguous Long"),
        ((torch.ones(2, 3), ZEROS, 3), "digit must be 0 to 2, got 3"),
        ((torch.ones(2, 3), ZEROS, 0, torch.ones(2)), "base must be"),
    ],
)
def test_the_native_twin_has_its_own_door(args, message):
    with pytest.raises(RuntimeError, match=f"magnitude_histogram: {message}"):
        torch.ops.neulig_fast_C.magnitude_histogram(*args)
