"""merge_task_vectors beyond test_house.py: closed forms, an oracle of its own, bounds and places,
draws, tiles, values that are no numbers, layouts, bits, errors."""

import importlib.util
import itertools

import pytest
import torch

import neulig_fast
from neulig_fast import testing
from neulig_fast._registry import OPS

OP = OPS["merge_task_vectors"]
BACKENDS = testing.backends_of(OP)
on_every_backend = pytest.mark.parametrize("device, backend", BACKENDS)
in_every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
needs_cpu = pytest.mark.skipif(("cpu", "cpu") not in BACKENDS, reason="no native cpu backend")
ELECTIONS = ("none", "weighted_sum", "sum", "weighted_count", "count")
NAN, INF = float("nan"), float("inf")


def run(backend, *args, **options):
    with neulig_fast.use_backend(merge_task_vectors=backend):
        return neulig_fast.merge_task_vectors(*args, **options)


def normal(*shape, device="cpu", dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def coarse(*shape, device="cpu", dtype=torch.float32, seed=0):
    """Multiples of 1/4: many are equal, and sums of their products are exact in every type."""
    return ((normal(*shape, seed=seed) * 4).round() / 4).to(device, dtype)


def interpreted(backend, device):
    return (backend, device) == ("triton", "cpu")


def tensor(*values, device="cpu", dtype=torch.float32):
    return torch.tensor(values, device=device, dtype=dtype)


# -- an oracle that shares no code with the op ----------------------------------------------------


def philox(key, counter):
    """Philox4x32-7 of whole numbers, after Salmon, Moraes, Dror, Shaw, SC 2011."""
    mask, (a, b, c, d) = 2**32 - 1, counter
    low, high = key & mask, key >> 32 & mask
    for _ in range(7):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ low, right & mask, (left >> 32) ^ d ^ high, left & mask
        low, high = (low + 0x9E3779B9) & mask, (high + 0xBB67AE85) & mask
    return a, b, c, d


def word(seed, stream, place):
    mask, (group, rest) = 2**32 - 1, divmod(place, 64)
    number, rest = divmod(rest, 16)

    def half(counter):
        words = philox(seed, (counter & mask, counter >> 32, stream & mask, stream >> 32 & mask))
        return words[number] >> 16 * (rest % 2) & 0xFFFF

    counter = 8 * group + rest // 2
    return half(counter) << 16 | half(counter + 2**63)


def keeps(options, i, place, d):
    """Whether expert i's element ``d`` at ``place`` of its tensor is kept."""
    size, kept = abs(d), True
    if (lower := options.get("lower")) is not None:
        cut = options.get("lower_cut")
        tie = True if cut is None else place < int(cut[i])
        bound = float(lower[i])
        kept &= not (size < bound or (size == bound and not tie))
    if (upper := options.get("upper")) is not None:
        cut = options.get("upper_cut")
        tie = True if cut is None else place >= int(cut[i])
        bound = float(upper[i])
        kept &= not (size > bound or (size == bound and not tie))
    if (density := options.get("density")) is not None:
        streams = options.get("streams")
        stream = i if streams is None else int(streams[i])
        share = round(float(density[i]) * 2**32)
        kept &= word(options.get("seed", 0), stream, place) < share
    return kept


def sign(x):
    return (x > 0) - (x < 0)


def merged_element(column, weights, base, place, options):
    """One element of theta in fp64, in Python's floats."""
    elect, divide = options.get("elect", "none"), options.get("divide", "none")
    scales, experts = options.get("scales"), range(len(column))
    d = [x - base for x in column]
    kept = [keeps(options, i, place, d[i]) for i in experts]
    v = [d[i] * (1 if scales is None else float(scales[i])) if kept[i] else 0.0 for i in experts]
    t = [weights[i] * v[i] if kept[i] else 0.0 for i in experts]
    agrees = kept
    if elect != "none":
        polls = {
            "weighted_sum": sum(t),
            "sum": sum(v),
            "weighted_count": sum(weights[i] * sign(v[i]) for i in experts),
            "count": sum(map(sign, v)),
        }
        sigma = sign(polls[elect]) or options.get("zero_sign", 1)
        on = t if elect.startswith("weighted") else v
        agrees = [x != x or (sigma != 0 and sign(x) == sigma) for x in on]
    terms = [t[i] for i in experts if agrees[i]]
    if options.get("combine") == "max":
        q = max(terms, key=abs, default=0.0)
    else:
        q = sum(terms)
    if divide == "count":
        q /= max(sum(agrees), 1)
    elif divide == "weights" and elect == "none":
        q /= 1 if abs(sum(weights)) < 1e-8 else sum(weights)
    elif divide == "weights":
        q /= sum(weights[i] for i in experts if agrees[i]) or 1
    return base + options.get("lam", 1.0) * q


def oracle(params, weights, base=None, **options):
    rows, w = params.double().T.tolist(), weights.double().tolist()
    origin = [0.0] * len(rows) if base is None else base.double().tolist()
    start = options.get("start", 0)
    found = [
        merged_element(column, w, b, start + p, options)
        for p, (column, b) in enumerate(zip(rows, origin, strict=True))
    ]
    return torch.tensor(found, dtype=torch.float64)


def assert_as_oracle(got, *args, **options):
    exact = oracle(*args, **options)
    testing.assert_within_rule(got, exact.to(got.dtype), exact)


# -- what it computes -----------------------------------------------------------------------------


@on_every_backend
def test_task_arithmetic_by_hand(device, backend):
    base = tensor(1.0, 2.0, -1.0, device=device)
    params = torch.stack([base + 1, base - 2])
    weights = tensor(0.5, 0.25, device=device)
    assert run(backend, params, weights, base).tolist() == [1.0, 2.0, -1.0]
    assert run(backend, params, weights, base, lam=2.0).tolist() == [1.0, 2.0, -1.0]
    assert run(backend, params[:1], weights[:1], base, lam=2.0).tolist() == [2.0, 3.0, 0.0]
    assert run(backend, params, weights).tolist() == [0.75, 1.5, -0.75]  # vectors already
    divided = run(backend, params, tensor(1.0, 3.0, device=device), base, divide="weights")
    assert divided.tolist() == [-0.25, 0.75, -2.25]
    tiny = tensor(1.0, -1.0 + 2.0**-30, device=device, dtype=torch.float64)
    got = run(backend, params.double(), tiny, base.double(), divide="weights")
    assert got[0] == 1 + 1 + 2 - 2 * 2.0**-30  # a sum below 1e-8 counts as 1
    got = run(backend, params, weights, base, divide="count")
    assert got.tolist() == [1.0, 2.0, -1.0]


@on_every_backend
def test_one_expert_and_a_base_of_zero_come_out_as_they_went_in(device, backend):
    x, one = normal(1, 100, device=device), torch.ones(1, device=device)
    assert torch.equal(run(backend, x, one), x[0])
    assert torch.equal(run(backend, x, one, torch.zeros_like(x[0])), x[0])


# Of one element: three values, what each election makes of them with weights 1, 1, 3.
@on_every_backend
@pytest.mark.parametrize(
    "values, elect, zero_sign, expected",
    [
        ((2.0, 1.0, -0.5), "weighted_sum", 1, 3.0),  # 2 + 1 - 1.5 > 0
        ((2.0, 1.0, -2.0), "weighted_sum", 1, -6.0),  # 2 + 1 - 6 < 0
        ((2.0, 1.0, -2.0), "sum", 1, 3.0),  # 2 + 1 - 2 > 0
        ((2.0, 1.0, -0.5), "weighted_count", 1, -1.5),  # 1 + 1 - 3 < 0
        ((-0.5, -0.25, 4.0), "count", 1, -0.75),  # two against one
        ((2.0, 1.0, -1.0), "weighted_sum", 1, 3.0),  # 2 + 1 - 3 = 0
        ((2.0, 1.0, -1.0), "weighted_sum", -1, -3.0),
        ((2.0, 1.0, -1.0), "weighted_sum", 0, 0.0),
        ((0.0, 1.0, -1.0), "count", -1, -3.0),
        ((0.0, 0.0, 0.0), "count", 1, 0.0),
    ],
)
def test_elections_by_hand(device, backend, values, elect, zero_sign, expected):
    params = tensor(*values, device=device)[:, None]
    weights = tensor(1.0, 1.0, 3.0, device=device)
    got = run(backend, params, weights, elect=elect, zero_sign=zero_sign)
    assert got.tolist() == [expected]


@on_every_backend
def test_divisors_by_hand(device, backend):
    params = tensor(2.0, 4.0, -1.0, 0.0, device=device)[:, None]
    weights = tensor(1.0, 2.0, 0.5, 4.0, device=device)
    options = {"elect": "weighted_sum"}
    assert run(backend, params, weights, **options, divide="count").tolist() == [5.0]
    got = run(backend, params, weights, **options, divide="weights").item()
    assert got == (torch.tensor(10.0) / 3).item()  # 1 + 2: zero does not agree
    opposite = tensor(1.0, -1.0, 0.0, 0.0, device=device)  # terms of 2 and -4
    got = run(backend, params, opposite, **options, divide="weights")
    assert got.tolist() == [4.0]  # -4 / -1
    nobody = run(backend, 0 * params, weights, **options, divide="count")
    assert nobody.tolist() == [0.0]
    weights = tensor(0.0, 0.0, 0.0, 0.0, device=device)
    got = run(backend, params, weights, elect="sum", divide="weights")
    assert got.tolist() == [0.0]  # 0 over a sum of weights of 0, which counts as 1


@on_every_backend
def test_the_largest_term_and_of_equal_ones_the_first(device, backend):
    params = tensor(
        [1.0, 2.0, -3.0, 0.0], [-1.0, 3.0, 3.0, 0.0], [0.5, -4.0, -3.0, 0.0], device=device
    )
    ones = torch.ones(3, device=device)
    assert run(backend, params, ones, combine="max").tolist() == [1.0, -4.0, -3.0, 0.0]
    got = run(backend, params, ones, combine="max", elect="sum")
    assert got.tolist() == [1.0, 3.0, -3.0, 0.0]


def some_options(device, dtype):
    """Every option at least once, in every election."""
    acc = torch.promote_types(dtype, torch.float32)
    bounds = {
        "lower": tensor(0.25, 0.5, 0.75, device=device, dtype=acc),
        "lower_cut": tensor(30, -1, 10**12, device=device, dtype=torch.int64),
    }
    upper = {
        "upper": tensor(1.5, 1.0, 2.0, device=device, dtype=acc),
        "upper_cut": tensor(20, 41, 0, device=device, dtype=torch.int64),
    }
    draws = {
        "density": tensor(0.5, 0.75, 0.25, device=device, dtype=torch.float64),
        "scales": tensor(2.0, 0.5, 4.0, device=device),
        "seed": 2**40 + 7,
        "start": 5,
    }
    streams = {"streams": tensor(2**35, -4, 0, device=device, dtype=torch.int64)}
    rules = [{}, bounds, {**bounds, **upper}, draws, {**upper, **draws, **streams}]
    rules += [{"lower": bounds["lower"], "upper": upper["upper"], "lam": -0.5}]
    ways = [("none", "sum"), ("weights", "sum"), ("count", "sum"), ("none", "max")]
    for k, (elect, rule) in enumerate(itertools.product(ELECTIONS, rules)):
        for divide, combine in (ways[k % 4], ways[(k + 1) % 4]):
            options = {**rule, "elect": elect, "divide": divide, "combine": combine}
            yield {**options, "zero_sign": (1, -1, 0)[k % 3]}


@in_every_dtype
@on_every_backend
def test_every_option_as_the_oracle_has_it(device, backend, dtype):
    slow = interpreted(backend, device)
    params, base = coarse(3, 45, dtype=dtype, device=device), coarse(45, seed=1).to(device, dtype)
    weights = tensor(0.5, -1.0, 0.75, device=device)
    cases = list(some_options(device, dtype))
    for k, options in enumerate(cases[:: 4 if slow and dtype != torch.float32 else 1]):
        origin = base if k % 5 else None
        got = run(backend, params, weights, origin, **options)
        assert_as_oracle(got, params, weights, origin, **options)


@on_every_backend
@pytest.mark.parametrize("experts", [1, 2, 5, 6, 8, 9, 12, 17, 64])
def test_any_number_of_experts(device, backend, experts):
    P = 20 if interpreted(backend, device) else 100
    params, base = coarse(experts, P, device=device), coarse(P, device=device, seed=1)
    weights = coarse(experts, device=device, seed=2)
    lower = coarse(experts, device=device, seed=3).abs()
    ties = {"lower": lower, "lower_cut": torch.full_like(lower, 11, dtype=torch.int64)}
    for options in (
        {},
        {**ties, "elect": "weighted_sum", "divide": "weights"},
        {**ties, "elect": "count", "combine": "max"},
        {**ties, "density": lower.double().clamp(max=1), "elect": "sum", "divide": "count"},
    ):
        got = run(backend, params, weights, base, **options)
        assert_as_oracle(got, params, weights, base, **options)


def test_more_experts_than_kernels_take_are_the_references():
    params, weights = coarse(65, 9), coarse(65, seed=1)
    assert_as_oracle(run("torch", params, weights, elect="sum"), params, weights, elect="sum")
    for backend in ("cpu", "triton"):
        if ("cpu", backend) in BACKENDS:
            with pytest.raises(RuntimeError, match="65 experts, more than 64"):
                run(backend, params, weights)


@on_every_backend
def test_empty_and_single_columns(device, backend):
    weights = torch.ones(2, device=device)
    for P in (0, 1, 3):
        params = coarse(2, P, device=device)
        for options in ({}, {"elect": "sum", "lower": 0.5 * weights}):
            got = run(backend, params, weights, params[0], **options)
            assert_as_oracle(got, params, weights, params[0], **options)


# -- bounds, places, tiles ------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ties_are_kept_by_place(device, backend, dtype):
    P, one = 100, torch.ones(1, device=device)
    params = torch.full((1, P), 0.1, device=device, dtype=dtype)
    bound = params[:, 0].abs()
    for cut, start in itertools.product((-(2**63), 0, 1, 50, 99, 100, 2**63 - 1), (0, 40, 2**62)):
        place = torch.arange(P, device=device) + start
        cuts = tensor(cut, device=device, dtype=torch.int64)
        below = run(backend, params, one, lower=bound, lower_cut=cuts, start=start) != 0
        above = run(backend, params, one, upper=bound, upper_cut=cuts, start=start) != 0
        assert torch.equal(below, place < cut) and torch.equal(above, place >= cut)
    assert run(backend, params, one, lower=bound, upper=bound).ne(0).all()  # no cut: all
    nearest = torch.nextafter(bound, torch.full_like(bound, 1.0))
    assert not run(backend, params, one, lower=nearest).any()
    nearest = torch.nextafter(bound, torch.zeros_like(bound))
    assert not run(backend, params, one, upper=nearest).any()


@on_every_backend
def test_a_count_is_kept_exactly(device, backend):
    """The largest k, as TIES has them, whatever is equal to what."""
    d = coarse(3, 257, device=device)
    magnitudes, order = d.abs().sort(dim=1, descending=True, stable=True)
    for k in (1, 60, 200, 257):
        lower, cut = magnitudes[:, k - 1], order[:, k - 1] + 1
        for i in range(3):
            one = {"lower": lower[i, None], "lower_cut": cut[i, None], "divide": "count"}
            expected = torch.zeros_like(d[i])
            expected[order[i, :k]] = d[i, order[i, :k]]
            got = run(backend, d[i : i + 1], torch.ones(1, device=device), **one)
            assert torch.equal(got, expected)


@on_every_backend
@pytest.mark.parametrize("value", [0.0, -1.0, -0.0, INF, -INF, NAN])
def test_bounds_that_bound_nothing_or_everything(device, backend, value):
    params = tensor([0.0, -0.0, 1e-45, -3.0, INF, -INF], device=device)
    bound, cut = tensor(value, device=device), tensor(3, device=device, dtype=torch.int64)
    one = torch.ones(1, device=device)
    for name, cuts in itertools.product(("lower", "upper"), (None, cut)):
        options = {name: bound} | ({} if cuts is None else {f"{name}_cut": cuts})
        got = run(backend, params, one, **options)
        expected = oracle(params, one, **options)
        assert torch.equal(got.double().cpu(), expected.cpu()), options


@in_every_dtype
@on_every_backend
def test_tiles_are_the_whole(device, backend, dtype):
    slow = interpreted(backend, device)
    P, cuts = (60, (13, 29, 30)) if slow else (9001, (1, 18, 4100, 4101, 8200))
    params, base = coarse(3, P, device=device, dtype=dtype), coarse(P, seed=1).to(device, dtype)
    weights = tensor(0.5, 1.0, 0.75, device=device)
    for options in list(some_options(device, dtype))[:: 11 if slow else 3]:
        start = options.pop("start", 3)
        whole = run(backend, params, weights, base, start=start, **options)
        edges = itertools.pairwise((0, *cuts, P))
        parts = [
            run(backend, params[:, a:b], weights, base[a:b], start=start + a, **options)
            for a, b in edges
        ]
        assert torch.equal(torch.cat(parts), whole)


# -- draws ----------------------------------------------------------------------------------------


def test_the_oracles_words_are_those_of_the_paper():
    """Random123's kat_vectors for philox4x32-7."""
    full = 2**32 - 1
    assert philox(0, (0, 0, 0, 0)) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    expected = (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)
    assert philox(2**64 - 1, (full, full, full, full)) == expected
    counter, key = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822
    assert philox(key, counter) == (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)


@on_every_backend
def test_draws_keep_what_the_words_say(device, backend):
    P = 150
    params, one = torch.ones(1, P, device=device), torch.ones(1, device=device)
    for seed, stream, start in ((0, 0, 0), (-1, 2**40 + 3, 5), (2**62, -7, 2**34 + 1), (3, 1, 2)):
        for density in (0.5, 0.1, 2.0**-33, 1 - 2.0**-33):
            got = run(
                backend, params, one, seed=seed, start=start,
                density=tensor(density, device=device, dtype=torch.float64),
                streams=tensor(stream, device=device, dtype=torch.int64),
            )  # fmt: skip
            share = round(density * 2**32)
            expected = [float(word(seed, stream, start + p) < share) for p in range(P)]
            assert got.tolist() == expected


@on_every_backend
def test_draws_whose_upper_half_is_the_densitys_are_decided_by_the_lower(device, backend):
    """Of one element of every register: thresholds at its word, and just above."""
    places = [p for w in range(4) for p in (16 * w, 16 * w + 7, 16 * w + 15, 64 + 16 * w + 10)]
    one, params = torch.ones(1, device=device), torch.ones(1, 128, device=device)
    for place in places[:4] if interpreted(backend, device) else places:
        random = word(9, 4, 2**33 + place)
        for share, kept in ((random, 0.0), (random + 1, 1.0)):
            got = run(
                backend, params, one, seed=9, start=2**33,
                density=tensor(share / 2**32, device=device, dtype=torch.float64),
                streams=tensor(4, device=device, dtype=torch.int64),
            )  # fmt: skip
            assert got[place] == kept


@on_every_backend
def test_a_word_that_equals_the_threshold_is_not_below_it(device, backend):
    params, one = torch.ones(1, 4, device=device), torch.ones(1, device=device)
    for p in range(4):
        for more in (0, 1):
            share = tensor((word(9, 0, p) + more) / 2**32, device=device, dtype=torch.float64)
            assert run(backend, params, one, density=share, seed=9)[p] == more


@on_every_backend
def test_densities_of_one_and_zero_and_between(device, backend):
    P = 200 if interpreted(backend, device) else 40_000
    params, ones = torch.ones(3, P, device=device), torch.eye(3, device=device)
    density = tensor(1.0, 0.0, 0.3, device=device, dtype=torch.float64)
    kept = [run(backend, params, one, density=density).sum().item() for one in ones]
    assert kept[0] == P and kept[1] == 0
    assert abs(kept[2] - 0.3 * P) < 5 * (0.21 * P) ** 0.5


@on_every_backend
def test_streams_and_seeds_draw_apart(device, backend):
    params, one = torch.ones(1, 300, device=device), torch.ones(1, device=device)
    half = tensor(0.5, device=device, dtype=torch.float64)
    seen = [
        run(backend, params, one, density=half, seed=seed, streams=torch.tensor([s], device=device))
        for seed, s in ((0, 0), (0, 1), (1, 0), (0, 2**32), (2**32, 0))
    ]
    for a, b in itertools.combinations(seen, 2):
        assert 90 < (a != b).sum() < 210
    assert torch.equal(seen[0], run(backend, params, one, density=half))  # stream 0 is its own


# -- values that are no numbers -------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("elect", ELECTIONS)
def test_nan_reaches_the_result(device, backend, elect):
    params = coarse(3, 40, device=device)
    params[1, 7] = NAN
    weights = tensor(0.5, 1.0, -0.25, device=device)
    base = coarse(40, device=device, seed=1)
    base[9] = NAN
    clean, origin = params.nan_to_num(0.0), base.nan_to_num(0.0)
    bounds = {"lower": 5 * weights.abs(), "upper": 0 * weights}
    zero = torch.zeros(3, device=device, dtype=torch.float64)
    for rule in ({}, {"lower": bounds["lower"]}, bounds):
        for combine, zero_sign in itertools.product(("sum", "max"), (1, -1, 0)):
            options = {**rule, "elect": elect, "combine": combine, "zero_sign": zero_sign}
            got = run(backend, params, weights, base, **options)
            assert got[7].isnan() and got[9].isnan() and got.isnan().sum() == 2
            expected = run(backend, clean, weights, origin, **options)
            others = ~got.isnan()
            assert torch.equal(got[others], expected[others])
    dropped = run(backend, params, weights, elect=elect, density=zero)
    assert not dropped.any()  # a draw drops NaN too


@on_every_backend
def test_infinities_vote_as_numbers_do(device, backend):
    params = tensor([INF, INF, 1.0], [-1.0, -INF, -INF], device=device)
    ones = torch.ones(2, device=device)
    got = run(backend, params, ones, elect="sum")
    assert got.tolist() == [INF, INF, -INF]  # of both kinds: zero_sign
    got = run(backend, params, ones, elect="sum", zero_sign=-1)
    assert got.tolist() == [INF, -INF, -INF]
    assert run(backend, params, ones, elect="sum", zero_sign=0).tolist() == [INF, INF, -INF]
    plain = run(backend, params, ones)
    assert plain[0] == INF and plain[1].isnan() and plain[2] == -INF
    assert run(backend, params, ones, combine="max").tolist() == [INF, INF, -INF]
    got = run(backend, params, ones, elect="count")
    assert got.tolist() == [INF, INF, 1.0]


@on_every_backend
def test_what_is_dropped_takes_no_part_even_where_its_weight_is_infinite(device, backend):
    params, weights = tensor([1.0, 4.0], [2.0, 2.0], device=device), tensor(INF, 1.0, device=device)
    lower = tensor(3.0, 0.0, device=device)
    for elect in ELECTIONS:
        assert run(backend, params, weights, lower=lower, elect=elect).tolist() == [2.0, INF]


@on_every_backend
def test_huge_values(device, backend):
    params, ones = tensor([3e38, 3e38], [3e38, -3e38], device=device), torch.ones(2, device=device)
    assert run(backend, params, ones).tolist() == [INF, 0.0]
    got = run(backend, params.double(), ones, out_dtype=torch.float16)
    assert got.tolist() == [INF, 0.0]
    assert run(backend, params, ones, combine="max", elect="sum")[0] == params[0, 0]


# -- memory ---------------------------------------------------------------------------------------


@in_every_dtype
@on_every_backend
def test_every_type_in_and_out(device, backend, dtype):
    params, base = normal(3, 50, device=device), normal(50, device=device, seed=1)
    params, base = params.to(dtype), base.to(dtype)
    weights = tensor(0.5, 0.25, 0.125, device=device)
    for out_dtype in testing.DTYPES:
        expected = run("torch", params, weights, base, out_dtype=out_dtype)
        got = run(backend, params, weights, base, out_dtype=out_dtype)
        out = torch.full((52,), 7.0, device=device, dtype=out_dtype)
        into = run(backend, params, weights, base, out=out[1:51])
        assert got.dtype == out_dtype and into.data_ptr() == out[1:].data_ptr()
        assert torch.equal(got, into) and out[0] == 7 and out[51] == 7
        if not (interpreted(backend, device) and out_dtype == torch.bfloat16):
            assert torch.equal(got, expected)  # the interpreter truncates to bf16


@in_every_dtype
@on_every_backend
def test_strided_and_unaligned_rows(device, backend, dtype):
    arena = coarse(7, 131, device=device, dtype=dtype)
    params, base = arena[1::2, 3:120], arena[0, 5:122]
    weights = tensor(0.5, 1.0, -0.75, device=device)
    for options in list(some_options(device, dtype))[:: 13 if interpreted(backend, device) else 2]:
        got = run(backend, params, weights, base, **options)
        assert torch.equal(got, run(backend, params.clone(), weights, base.clone(), **options))
        assert_as_oracle(got, params, weights, base, **options)


@on_every_backend
def test_rows_further_apart_than_two_to_the_31_elements(device, backend):
    stride = 2**31 + 64
    buffer = torch.empty(stride + 5, device=device, dtype=torch.bfloat16)  # two pages are touched
    params = buffer.as_strided((2, 5), (stride, 1))
    params[0], params[1] = 1.0, 2.0
    assert run(backend, params, torch.ones(2, device=device), elect="sum").eq(3).all()


def test_columns_that_are_not_contiguous_are_the_references():
    params, base = coarse(3, 40).mT.contiguous().mT, coarse(80)[::2]
    weights = torch.ones(3)
    with neulig_fast.use_backend("torch"):
        expected = neulig_fast.merge_task_vectors(params.contiguous(), weights, base.contiguous())
        assert torch.equal(neulig_fast.merge_task_vectors(params, weights, base), expected)
    for backend in {b for _, b in BACKENDS} - {"torch"}:
        with pytest.raises(RuntimeError, match="columns are not contiguous"):
            run(backend, params, weights)
        with pytest.raises(RuntimeError, match="base is not contiguous"):
            run(backend, params.contiguous(), weights, base)


@needs_cpu
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_outputs_too_large_for_the_caches_have_the_same_bits(out_dtype):
    P = (32 << 20) // out_dtype.itemsize + 77
    params = coarse(2, P + 3, dtype=torch.bfloat16)[:, 3:]
    options = {
        "lower": tensor(0.5, 0.25),
        "lower_cut": tensor(P - 20, 4099, dtype=torch.int64),
        "elect": "weighted_sum",
        "divide": "weights",
    }
    out = torch.empty(P + 1, dtype=out_dtype)[1:]
    run("cpu", params, tensor(0.5, 0.75), params[1], out=out, **options)
    for a, b in ((0, 5000), (P // 2, P // 2 + 99), (P - 5000, P)):
        part = params[:, a:b]
        expected = run("torch", part, tensor(0.5, 0.75), part[1], start=a, **options)
        assert torch.equal(out[a:b], expected.to(out_dtype))


@needs_cpu
def test_bits_do_not_depend_on_threads():
    params, base, seen = normal(3, 700_001), normal(700_001, seed=1), []
    weights, threads = tensor(0.3, 0.4, 0.5), torch.get_num_threads()
    options = list(some_options("cpu", torch.float32))[5::20]
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            seen.append([run("cpu", params, weights, base, **each) for each in options])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@needs_cpu
@in_every_dtype
def test_ordinary_values_have_the_references_bits(dtype):
    acc = torch.promote_types(dtype, torch.float32)
    params, base = normal(3, 5003, dtype=dtype), normal(5003, seed=1).to(dtype)
    weights = normal(3, dtype=acc, seed=2)
    for options in some_options("cpu", dtype):
        got, expected = (run(b, params, weights, base, **options) for b in ("cpu", "torch"))
        assert torch.equal(got, expected)


@needs_cpu
@in_every_dtype
@pytest.mark.parametrize("experts", range(1, 10))
def test_kernels_of_the_usual_case_have_the_references_bits(experts, dtype):
    """Task arithmetic and TIES, of which the kernels have forms for so many experts."""
    params, base = normal(experts, 333, dtype=dtype), normal(333, seed=1).to(dtype)
    params[0, 40], params[-1, 41], params[0, 42], base[300] = NAN, -INF, 3e38, NAN
    lower = normal(experts, seed=3).abs()
    ties = {"lower": lower, "lower_cut": (100 * lower).long(), "elect": "weighted_sum"}
    for options in ({}, {"lower": lower}, {**ties, "divide": "weights"}, ties):
        weights = normal(experts, seed=2).abs()
        got, expected = (run(b, params, weights, base, **options) for b in ("cpu", "torch"))
        assert got[40].isnan() and got[300].isnan()
        assert torch.equal(got.nan_to_num(7.0, INF, -INF), expected.nan_to_num(7.0, INF, -INF))


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 3])
def test_lower_instruction_sets_have_the_same_bits(python, level):
    from neulig_fast import _C

    if level >= _C.cpu_level():
        pytest.skip(f"level {_C.cpu_level()} is what the other tests run at")
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import test_merge_task_vectors as t\n"
        "for dtype in t.testing.DTYPES:\n"
        "    t.test_ordinary_values_have_the_references_bits(dtype)\n"
        "    t.test_every_option_as_the_oracle_has_it('cpu', 'cpu', dtype)\n"
        "    for n in range(1, 10):\n"
        "        t.test_kernels_of_the_usual_case_have_the_references_bits(n, dtype)\n"
        "for elect in t.ELECTIONS: t.test_nan_reaches_the_result('cpu', 'cpu', elect)\n"
        "t.test_draws_keep_what_the_words_say('cpu', 'cpu')\n"
        "t.test_infinities_vote_as_numbers_do('cpu', 'cpu')\n"
    )
    done = python(code, NEULIG_FAST_CPU=str(level))
    assert done.returncode == 0, done.stderr


# -- compiled -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_public_function_compiles_to_one_graph(dynamic):
    def call(params, weights, base, lower, start, out=None):
        options = {"lower": lower, "start": start, "elect": "sum", "lam": 0.5, "out": out}
        return 2 * neulig_fast.merge_task_vectors(params, weights, base, **options)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for P, start in ((30, 0), (40, 7), (50, 1000)):
        args = coarse(3, P), coarse(3, seed=1), coarse(P, seed=2), coarse(3, seed=3).abs(), start
        assert torch.equal(compiled(*args), call(*args))
        assert torch.equal(compiled(*args, torch.empty(P)), call(*args))


# -- errors ---------------------------------------------------------------------------------------

X, W = torch.ones(2, 3), torch.ones(2)


@pytest.mark.parametrize(
    "args, options, message",
    [
        ((torch.ones(3), W), {}, r"params must be \(N, P\)"),
        ((X.int(), W), {}, "params must be fp32, bf16, fp16 or fp64"),
        ((X, torch.ones(3)), {}, r"weights must be \(N,\) = \(2,\), got \(3,\)"),
        ((X, W.int()), {}, "weights must be floating point"),
        ((X, W, torch.ones(2)), {}, r"base must be \(P,\) = \(3,\), got \(2,\)"),
        ((X, W, torch.ones(3).half()), {}, "base must be torch.float32 on cpu like params"),
        ((X, W), {"lower": W.double()}, "lower must be torch.float32 or a float type it holds"),
        ((X, W), {"upper": W.int()}, "upper must be floating point"),
        ((X, W), {"lower": W, "lower_cut": W}, "lower_cut must be int64, got torch.float32"),
        ((X, W), {"lower_cut": W.long()}, "lower_cut is given without lower"),
        ((X, W), {"upper_cut": W.long()}, "upper_cut is given without upper"),
        ((X, W), {"streams": W.long()}, "streams is given without density"),
        ((X, W), {"density": torch.tensor([0.5, 1.5])}, r"density must be in \[0, 1\]"),
        ((X, W), {"density": torch.tensor([NAN, 0.5])}, r"density must be in \[0, 1\]"),
        ((X, W), {"scales": torch.ones(1)}, r"scales must be \(N,\)"),
        ((X, W), {"elect": "weighted"}, "elect must be one of 'none'.*did you mean"),
        ((X, W), {"divide": "mean"}, "divide must be one of 'none', 'weights', 'count'"),
        ((X, W), {"combine": "min"}, "combine must be one of 'sum', 'max'"),
        ((X, W), {"combine": "max", "divide": "count"}, "combine 'max' divides by nothing"),
        ((X, W), {"zero_sign": 2}, "zero_sign must be -1, 0 or 1, got 2"),
        ((X, W), {"start": -1}, "start must not be negative, got -1"),
        ((X, W), {"seed": 2**63}, "seed must be a signed 64-bit integer"),
        ((X, W), {"out_dtype": torch.int32}, "out_dtype must be fp32, bf16, fp16 or fp64"),
        ((X, W), {"out": torch.ones(4)}, r"out must be \(P,\) = \(3,\), got \(4,\)"),
        ((X, W), {"out": torch.ones(6)[::2]}, "out must be contiguous, got stride 2"),
        ((X, W), {"out": torch.ones(3).int()}, "out must be fp32, bf16, fp16 or fp64"),
        ((X, W), {"out": X[1]}, "out shares memory with params"),
        ((X, W, X[0]), {"out": X[0]}, "out shares memory with base"),
        ((X, W), {"out": torch.ones(3), "out_dtype": torch.float64}, "out is torch.float32, and"),
        ((X.to_sparse(), W), {}, "params must be dense"),
    ],
)
def test_wrong_arguments_are_named(args, options, message):
    with pytest.raises(ValueError, match=f"merge_task_vectors_?: (.|\n)*{message}"):
        neulig_fast.merge_task_vectors(*args, **options)
    assert X.eq(1).all() and W.eq(1).all()


def test_every_fault_is_listed():
    with pytest.raises(ValueError, match="4 problems") as error:
        neulig_fast.merge_task_vectors(
            X, torch.ones(3), lower=W.int(), elect="most", zero_sign=5, out_dtype=None
        )
    for part in ("weights must be", "lower must be", "elect must be", "zero_sign must be"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    "args, options, message",
    [
        ((X, [1.0, 1.0]), {}, "weights must be a tensor, got list"),
        ((X, W), {"density": 0.5}, "density must be a tensor, got float"),
        ((X, W), {"seed": 0.5}, "seed must be an integer, got 0.5"),
        ((X, W), {"lam": "1"}, "lam must be a number, got '1'"),
        ((X, W), {"elect": None}, "elect must be a string, got None"),
        ((X, W), {"out_dtype": "float32"}, "out_dtype must be a torch.dtype"),
        ((X, W), {"out": [0.0]}, "out must be a tensor, got list"),
    ],
)
def test_what_is_of_another_type_is_named(args, options, message):
    with pytest.raises(TypeError, match=f"merge_task_vectors: (.|\n)*{message}"):
        neulig_fast.merge_task_vectors(*args, **options)


def test_gradients_are_refused_in_words():
    weights = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="merge_task_vectors: not differentiable"):
        neulig_fast.merge_task_vectors(X, weights).sum().backward()
    with pytest.raises(RuntimeError, match="merge_task_vectors_: not differentiable, but weights"):
        neulig_fast.merge_task_vectors(X, weights, out=torch.empty(3))
    with torch.no_grad():
        assert neulig_fast.merge_task_vectors(X, weights, out=torch.empty(3)).eq(2).all()


@needs_cpu
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"out": torch.ones(4)}, r"out must be contiguous Float \(3\)"),
        ({"out": torch.ones(3).int()}, "out must be float32, bfloat16"),
        ({"params": torch.ones(3)}, r"params must be \(N, P\)"),
        ({"params": torch.ones(65, 3), "numbers": torch.ones(5, 65)}, "at most 64 rows, got 65"),
        ({"base": torch.ones(3).half()}, "base must be contiguous Float"),
        ({"numbers": torch.ones(4, 2)}, "numbers must be contiguous Float"),
        ({"places": torch.ones(4, 2)}, "places must be contiguous Long"),
        ({"rule": 1}, "rule 1 needs places"),
        ({"rule": 16}, "rule must be 0 to 15, got 16"),
        ({"start": -1}, "start must be 0 to"),
        ({"start": 2**63 - 3}, "start must be 0 to"),
        ({"elect": 5}, "elect must be 0 to 4"),
        ({"zero_sign": 2}, "zero_sign must be -1 to 1"),
        ({"divide": 1, "combine": 1}, "divide must be 0 to 0"),
        ({"combine": 2}, "combine must be 0 to 1"),
    ],
)
def test_the_native_twin_has_its_own_door(changes, message):
    call = {"out": torch.ones(3), "params": X, "base": None, "numbers": torch.ones(5, 2)}
    call |= {"places": None, "rule": 0, "seed": 0, "start": 0, "elect": 0, "zero_sign": 1}
    call |= {"divide": 0, "combine": 0} | changes
    with pytest.raises(RuntimeError, match=f"merge_task_vectors: (.|\n)*{message}"):
        torch.ops.neulig_fast_C.merge_task_vectors(**call)


# -- Triton ---------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_holds_all_experts_or_a_divisor_of_their_number():
    from neulig_fast.kernels._launch import config

    held = {n: config("merge_task_vectors", torch.float32, n, 1).held for n in range(1, 65)}
    assert all(n % h == 0 and 1 <= h <= 8 for n, h in held.items())
    assert all(held[n] == n for n in range(1, 9)) and held[64] == 8 and held[11] == 1
