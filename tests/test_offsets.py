"""OffsetStats: identities of the Gram matrix, groups, and the degenerate cases."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from neulig_fast import offset_gram
from neulig_fast.offsets import OffsetStats
from neulig_fast.pool import ExpertPool

EPS = torch.finfo(torch.float64).eps
F64 = {"dtype": torch.float64}
GOLDEN = json.loads((Path(__file__).parent / "data" / "neulig_case1.json").read_text())
SHAPES = {
    "conv1.weight": (4, 3),
    "blocks.0.attn.weight": (5, 5),
    "blocks.0.mlp.weight": (7,),
    "blocks.1.mlp.weight": (7,),
    "scale": (),
}


def random_pool(n: int, seed: int = 0, spread: float = 1.0) -> ExpertPool:
    generator = torch.Generator().manual_seed(seed)
    base = {key: torch.randn(shape, generator=generator, **F64) for key, shape in SHAPES.items()}
    return ExpertPool(
        [
            {
                k: t + spread * torch.randn(t.shape, generator=generator, **F64)
                for k, t in base.items()
            }
            for _ in range(n)
        ]
    )


def flat(pool: ExpertPool, *prefixes: str) -> torch.Tensor:
    """(N, p): the experts' parameters whose names start with one of the prefixes, no padding."""
    keys = [k for k in pool.segments.names if k.startswith(prefixes or ("",))]
    rows = [pool.state_dict(i) for i in range(pool.num_experts)]
    return torch.stack([torch.cat([row[k].reshape(-1) for k in keys]) for row in rows])


def close(actual: torch.Tensor, expected: torch.Tensor, terms: int = 100) -> None:
    """Equal up to the rounding of fp64 sums over ``terms`` terms of the expected size."""
    bound = terms * EPS * max(float(expected.abs().max()), EPS)
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float64
    assert float((actual - expected).abs().max()) <= bound


# --- identities -------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 6), seed=st.integers(0, 99), spread=st.sampled_from([1e-3, 1.0, 30.0]))
def test_whole_model_statistics_are_their_definitions(n, seed, spread):
    pool = random_pool(n, seed, spread)
    stats = pool.offsets()
    theta = flat(pool)
    xi = theta - theta.mean(0)
    scale = float(theta.abs().max())
    rounding = torch.full((), scale * theta.shape[1] * spread, **F64)
    assert stats.sums.shape == (n,) and stats.gram.shape == (n, n)
    assert float((stats.sums - xi.sum(1)).abs().max()) <= 100 * EPS * rounding / min(spread, 1)
    assert float((stats.gram - xi @ xi.T).abs().max()) <= 100 * EPS * rounding * max(spread, 1)
    # sum_i xi_i = 0: rows of G and all sums add up to nothing.
    assert float(stats.gram.sum(1).abs().max()) <= 100 * EPS * rounding * max(spread, 1)
    assert abs(float(stats.sums.sum())) <= 100 * EPS * rounding / min(spread, 1)
    assert torch.equal(stats.gram, stats.gram.T)
    # D_ij = ||theta_i - theta_j||^2 and tr G = (1/N) sum_{i<j} D_ij.
    direct = (theta[:, None] - theta[None]).square().sum(-1)
    bound = 100 * EPS * rounding * max(spread, 1)
    assert float((stats.distances - direct).abs().max()) <= 4 * bound
    trace = float(stats.gram.trace())
    assert abs(trace - float(stats.distances.triu().sum()) / n) <= 4 * bound * n


def test_groups_add_up_to_the_model():
    pool = random_pool(4)
    model, layers, tensors = (pool.offsets(by) for by in ("model", "layer", "tensor"))
    assert tensors.labels == tuple(SHAPES)
    assert layers.labels == ("conv1", "blocks.0", "blocks.1", "scale")
    assert tensors.gram.shape == (5, 4, 4) and layers.sums.shape == (4, 4)
    assert model.labels == ()
    for stats in (layers, tensors):
        close(stats.total_gram, model.gram)
        close(stats.total().sums, model.sums)
        close(stats.zscores, model.zscores)
    for i, label in enumerate(layers.labels):
        theta = flat(pool, label)
        xi = theta - theta.mean(0)
        close(layers.gram[i], xi @ xi.T)


def test_total_weighs_groups():
    stats = random_pool(3).offsets("layer")
    only = stats.total([0.0, 1.0, 0.0, 0.0])
    assert torch.equal(only.gram, stats.gram[1]) and torch.equal(only.sums, stats.sums[1])
    traces = stats.gram.diagonal(dim1=1, dim2=2).sum(1)
    close(stats.total(1 / traces).gram.trace(), torch.tensor(4.0, **F64))
    whole = stats.total()
    assert whole.total() is whole
    close(whole.total(torch.tensor([3.0])).gram, 3 * whole.gram)
    with pytest.raises(ValueError, match=r"weights must be \(4,\), got \(3,\)"):
        stats.total([1.0, 1.0, 1.0])


def test_permuting_experts_permutes_the_statistics():
    experts = [random_pool(4).state_dict(i) for i in range(4)]
    order = [2, 0, 3, 1]
    stats, permuted = (
        ExpertPool(experts).offsets(),
        ExpertPool([experts[i] for i in order]).offsets(),
    )
    close(permuted.gram, stats.gram[order][:, order])
    close(permuted.sums, stats.sums[order])
    close(permuted.zscores, stats.zscores[order])


def test_buffers_and_counters_stay_out():
    nets = [nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)) for _ in range(3)]
    expected = ExpertPool(nets).offsets()
    for i, net in enumerate(nets):
        net[1].running_mean += 100 * i
        net[1].running_var += i
        net[1].num_batches_tracked += 1000 * i
    stats = ExpertPool(nets).offsets()
    assert torch.equal(stats.gram, expected.gram) and torch.equal(stats.sums, expected.sums)
    assert stats.zscores.abs().max() > 0
    labels = ExpertPool(nets).offsets("tensor").labels
    assert labels == ("0.weight", "0.bias", "1.weight", "1.bias")


def test_buffers_alone_have_no_offsets():
    pool = ExpertPool([{"bn.running_mean": torch.full((3,), float(i))} for i in range(2)])
    assert pool.num_parameter_columns == 0
    stats = pool.offsets()
    assert not stats.gram.any() and not stats.sums.any() and not stats.zscores.any()
    assert pool.offsets("layer").labels == ()


# --- z-scores ---------------------------------------------------------------------------------


def golden(key: str) -> torch.Tensor:
    return torch.tensor(GOLDEN[key], **F64)


def test_golden_case_one():
    """The official code's numbers for NeuLig (arXiv 2503.01268), reproduced in fp64."""
    shapes = {"fc1.bias": (8,), "fc1.weight": (8, 7), "fc2.bias": (5,), "fc2.weight": (5, 8)}
    sizes = [math.prod(shape) for shape in shapes.values()]
    rows = [theta.split(sizes) for theta in golden("experts_theta")]
    pool = ExpertPool(
        [{k: t.view(shapes[k]) for k, t in zip(shapes, row, strict=True)} for row in rows]
    )
    stats, tensors = pool.offsets(), pool.offsets("tensor")
    pairs = [
        (stats.sums, "offset_sums_S"),
        (stats.zscores, "offset_zscores_s"),
        (stats.gram, "gram_G"),
        *((tensors.gram[i], f"gram_{k.replace('.', '_')}") for i, k in enumerate(tensors.labels)),
    ]
    for actual, key in pairs:
        assert float((actual - golden(key)).abs().max()) <= 1e-12, key
    weights = golden("coopvec_w")
    variance = torch.einsum("bi,ij,bj->b", weights, stats.distances / 2, weights)
    assert float((variance - golden("variance_penalty_V")).abs().max()) <= 1e-12


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8, unique=True))
def test_zscores_are_centred_with_unit_variance(values):
    sums = torch.tensor(values, **F64)
    zscores = OffsetStats(sums, torch.zeros(len(values), len(values))).zscores
    assert abs(float(zscores.sum())) <= 100 * EPS
    assert abs(float(zscores.square().sum()) - (len(values) - 1)) <= 100 * EPS
    assert bool((zscores[sums.argsort()].diff() >= 0).all())


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-7, 1e-9), (1, 1 + EPS), (0, 1e-300)])
def test_two_experts_always_score_one_over_root_two(low, high):
    zscores = OffsetStats(torch.tensor([low, high], **F64), torch.zeros(2, 2)).zscores
    close(zscores, torch.tensor([-(0.5**0.5), 0.5**0.5], **F64))


@pytest.mark.parametrize("sums", [[3.0], [0.1, 0.1], [0.1] * 7])
def test_identical_sums_score_zero(sums):
    n = len(sums)
    zscores = OffsetStats(torch.tensor(sums, **F64), torch.zeros(n, n)).zscores
    assert torch.equal(zscores, torch.zeros(n, **F64))


# --- what follows from the Gram matrix --------------------------------------------------------


def test_variance_of_a_merge_is_its_definition():
    pool = random_pool(4)
    theta, stats, layers = flat(pool), pool.offsets(), pool.offsets("layer")
    weights = torch.softmax(torch.randn(6, 4, generator=torch.Generator().manual_seed(1), **F64), 1)
    merged = weights @ theta
    direct = (weights * (theta[None] - merged[:, None]).square().sum(-1)).sum(-1)
    close(stats.variance(weights), direct)
    close(stats.variance(weights[2]), direct[2])
    close(layers.variance(weights).sum(0), direct)
    gram = stats.gram
    close(stats.variance(weights), weights @ gram.diagonal() - ((weights @ gram) * weights).sum(1))
    assert not stats.variance(torch.eye(4)).any()


def test_dispersion_is_the_mean_squared_way_to_one_merge():
    pool = random_pool(3)
    theta, stats, layers = flat(pool), pool.offsets(), pool.offsets("layer")
    weights = torch.softmax(torch.randn(5, 3, generator=torch.Generator().manual_seed(2), **F64), 1)
    merged = weights @ theta
    direct = (merged - merged.mean(0)).square().sum(1).mean()
    close(stats.dispersion(weights), direct)
    close(layers.dispersion(weights).sum(0), direct)
    assert not stats.dispersion(weights[:1]).any()


@pytest.mark.parametrize("base", [None, 0, 2])
@pytest.mark.parametrize("by", ["model", "layer"])
def test_cosines_and_kinship_are_those_of_the_task_vectors(base, by):
    pool = random_pool(4)
    stats = pool.offsets(by)
    for at, label in enumerate(stats.labels or ("",)):
        theta = flat(pool, label)
        task = theta - (theta.mean(0) if base is None else theta[base])
        kept = [i for i in range(4) if i != base]
        cosines = torch.nn.functional.cosine_similarity(task[:, None], task[None], dim=-1)
        got = stats.cosines(base) if by == "model" else stats.cosines(base)[at]
        close(got[kept][:, kept], cosines[kept][:, kept])
        if base is not None:
            assert not got[base].any() and not got[:, base].any()
        pairs = [abs(float(cosines[i, j])) for i in kept for j in kept if i < j]
        kinship = stats.kinship(base) if by == "model" else stats.kinship(base)[at]
        assert abs(float(kinship) - sum(pairs) / len(pairs)) <= 100 * EPS


def test_experts_of_one_direction_are_kin():
    base, step = torch.randn(50, **F64), torch.randn(50, **F64)
    pool = ExpertPool([{"w": base + c * step} for c in (0.0, 1.0, 3.0, -2.0)])
    stats = pool.offsets()
    assert abs(float(stats.kinship(base=0)) - 1) <= 100 * EPS
    assert float(stats.cosines(0)[1, 3]) < -1 + 100 * EPS
    close(stats.traces, stats.distances.triu().sum() / 4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_expert_has_no_cosines(value):
    rows = torch.randn(4, 6)
    rows[1, 2] = value
    sums, gram = offset_gram(rows)
    stats = OffsetStats(sums[0], gram[0])
    assert stats.cosines().isnan().all() and stats.kinship().isnan()
    gram = torch.zeros(3, 3)
    gram[2] = gram[:, 2] = value
    cosines = OffsetStats(torch.zeros(3), gram).cosines()  # the others coincide
    assert cosines[:2].eq(0).all() and cosines[2, 2].isnan()


def test_statistics_do_not_go_to_the_default_device():
    sums, gram = offset_gram(torch.randn(3, 8), torch.tensor([0, 5, 8]))
    with torch.device("meta"):
        stats = OffsetStats.grouped(sums, gram, ["a", "b"])
        assert stats.total().kinship().device == stats.cosines().device == torch.device("cpu")
        assert stats.total([1.0, 0.5]).variance([1.0, 0.0, 0.0]).abs() < 1e-9


def test_wrong_weights_and_bases_are_named():
    stats = random_pool(3).offsets()
    with pytest.raises(ValueError, match=r"variance: weights must be .* N = 3, got \(2,\)"):
        stats.variance([0.5, 0.5])
    with pytest.raises(ValueError, match=r"dispersion: weights must be \(B, N\)"):
        stats.dispersion(torch.ones(3))
    with pytest.raises(ValueError, match=r"base must be an expert 0 \.\. 2, got 3"):
        stats.cosines(3)
    with pytest.raises(ValueError, match="needs two task vectors, got 1"):
        random_pool(2).offsets().kinship(0)


# --- normalised forms -------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["model", "layer"])
def test_normalised_gram_has_the_trace_of_the_scores(by):
    stats = random_pool(5).offsets(by)
    normalized = stats.gram_normalized()
    traces = normalized.diagonal(dim1=-2, dim2=-1).sum(-1)
    close(traces, torch.full_like(traces, 4.0))
    raw = stats.gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    close(normalized * raw[..., None, None], 4 * stats.gram)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_variance_matrix_measures_the_spread_of_a_merge(n):
    pool = random_pool(n)
    stats = pool.offsets()
    theta = flat(pool)
    weights = torch.softmax(torch.linspace(0, 2, n, **F64), 0)
    merged = weights @ theta
    variance = (weights * (theta - merged).square().sum(1)).sum()
    unit = stats.distances.sum() / (n * (n - 1))
    matrix = stats.variance_matrix()
    close(weights @ matrix @ weights, variance / unit)
    uniform = torch.full((n,), 1 / n, **F64)
    close(uniform @ matrix @ uniform, torch.tensor((n - 1) / (2 * n), **F64))
    assert not matrix.diagonal().any() and torch.equal(matrix, matrix.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_identical_experts_have_no_penalty_at_all(n, dtype):
    generator = torch.Generator().manual_seed(1)
    expert = {"0.w": torch.randn(1000, generator=generator).to(dtype), "b": torch.rand(7).to(dtype)}
    for by in ("model", "tensor", "layer"):
        stats = ExpertPool([expert] * n).offsets(by)
        for matrix in (stats.gram_normalized(), stats.variance_matrix(), stats.distances):
            assert not matrix.any()
        assert not stats.zscores.any()


def test_one_identical_layer_does_not_disturb_the_others():
    experts = [random_pool(3).state_dict(i) for i in range(3)]
    for expert in experts[1:]:
        expert["conv1.weight"] = experts[0]["conv1.weight"]
    stats = ExpertPool(experts).offsets("layer")
    for matrices in (stats.gram_normalized(), stats.variance_matrix()):
        assert not matrices[0].any()
        assert matrices.isfinite().all() and all(matrix.any() for matrix in matrices[1:])


# --- the door ---------------------------------------------------------------------------------


def test_results_are_fp64_on_the_cpu_whatever_comes_in():
    stats = OffsetStats(torch.zeros(2, requires_grad=True), torch.zeros(2, 2, dtype=torch.float16))
    assert stats.sums.dtype == stats.gram.dtype == torch.float64
    assert not stats.sums.requires_grad
    assert repr(stats) == "OffsetStats(2 experts, whole model)"
    assert repr(random_pool(2).offsets("layer")) == "OffsetStats(2 experts, 4 groups)"


@pytest.mark.parametrize(
    ("sums", "gram", "labels", "message"),
    [
        ((3,), (2, 2), (), r"gram must be .*got \(2, 2\) for sums \(3,\)"),
        ((2, 3), (2, 3, 3), ("a",), r"sums must be .*got \(2, 3\) and 1 labels"),
        ((2, 3), (3, 3), ("a", "b"), "gram must be"),
        ((3,), (3, 3), ("a",), "sums must be"),
        ((0,), (0, 0), (), "sums must be"),
        ((), (1, 1), (), "sums must be"),
    ],
)
def test_shapes_must_fit(sums, gram, labels, message):
    with pytest.raises(ValueError, match=message):
        OffsetStats(torch.zeros(sums), torch.zeros(gram), labels)


def test_by_must_be_known():
    with pytest.raises(ValueError, match="by must be model, tensor or layer, got 'layers'"):
        random_pool(2).offsets("layers")
