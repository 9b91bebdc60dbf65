"""Averages in training against torch's own, in fp64 and in closed form; the patch; state dicts."""

import copy
import pickle

import pytest
import torch
from torch.optim import swa_utils

import neulig_fast as nf
from neulig_fast import testing
from neulig_fast.compat._seam import Counts

DTYPES = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
UPDATE = "torch.optim.swa_utils:AveragedModel.update_parameters"


@pytest.fixture(autouse=True)
def _undone():
    yield
    for handle in nf.patch.status():
        handle.undo()


def lists(dtype, seed=0):
    """Of every layout: dense, in another order of elements, strided, of no and one element."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((5, 7), (2, 3, 4, 4), (6, 8), (), (0, 3), (1,), (4, 6))
    made = [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]
    made[1] = made[1].contiguous(memory_format=torch.channels_last)
    made[2] = made[2].T
    made[6] = made[6][:, ::2]
    return made


@DTYPES
@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("number", [int, torch.tensor])
def test_a_step_is_at_least_as_exact_as_torchs(dtype, kind, number):
    averages, models = lists(dtype), lists(dtype, 1)
    models[2] = models[2].contiguous()  # another order than the average's
    share = 0.1 if kind == "ema" else 1 / 5
    arguments = (0.9,) if kind == "ema" else ()
    got, theirs = (copy.deepcopy(averages) for _ in range(2))
    getattr(nf, f"{kind}_multi_avg_fn")(*arguments)(got, models, number(4))
    getattr(swa_utils, f"get_{kind}_multi_avg_fn")(*arguments)(theirs, models, number(4))
    for mine, other, start, model in zip(got, theirs, averages, models, strict=True):
        exact = start.double() + share * (model.double() - start.double())
        testing.assert_within_rule(mine, other, exact)


def test_tables_follow_the_memory():
    function = nf.ema_multi_avg_fn(0.5)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        for size in (10, 20, 20):
            averages, models = [torch.zeros(size, dtype=dtype)], [torch.ones(size, dtype=dtype)]
            for _ in range(2):
                function(averages, models, 1)
            assert torch.equal(averages[0], torch.full((size,), 0.75, dtype=dtype))
    models[0].fill_(0)  # written to, in the same memory
    function(averages, models, 1)
    assert torch.equal(averages[0], torch.full((20,), 0.375))


def test_complex_numbers_and_integers():
    a, m = torch.randn(3, 4, dtype=torch.complex64), torch.randn(3, 4, dtype=torch.complex64)
    got = [a.clone()]
    nf.ema_multi_avg_fn(0.9)(got, [m], 1)
    assert torch.allclose(got[0], torch.lerp(a, m, 0.1))
    counts = [torch.tensor([10, 7, -3])]
    nf.ema_multi_avg_fn(0.5)(counts, [torch.tensor([14, 7, -9])], 1)
    assert counts[0].tolist() == [12, 7, -6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_views_of_another_sign_than_their_memorys(dtype):
    start, model = torch.randn(6, 4, dtype=dtype), torch.randn(6, 4, dtype=dtype)
    function = nf.ema_multi_avg_fn(0.5)
    for view in (torch._neg_view, torch.conj, lambda x: torch._neg_view(x.conj())):
        for cut in (lambda x: x, lambda x: x[:, ::2], lambda x: x.T):
            average = start.clone()
            for number, models in enumerate((cut(model), view(cut(model)))):  # of one memory
                expected = cut(average).lerp(models.resolve_neg(), 0.5)
                function([cut(average)], [models], number)
                assert torch.allclose(cut(average), expected)
            moved = view(cut(start.clone()))
            function([moved], [cut(model)], 1)
            assert torch.allclose(moved, view(cut(start)).resolve_neg().lerp(cut(model), 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_average_in_two_bytes_moves_as_it_should(dtype):
    size, steps, decay = 4096, 400, 0.999
    expected = 1 - decay**steps
    ends = {}
    for rounding in ("nearest", "stochastic"):
        function = nf.ema_multi_avg_fn(decay, rounding=rounding, seed=3)
        average, model = (
            torch.full((size,), 2.0, dtype=dtype),
            torch.full((size,), 3.0, dtype=dtype),
        )
        for step in range(1, steps + 1):
            function([average], [model], step)
        ends[rounding] = average.double() - 2
    assert torch.equal(ends["nearest"], torch.zeros(size).double()) or dtype == torch.float16
    spread = ends["stochastic"].std() / size**0.5
    assert abs(ends["stochastic"].mean() - expected) < 5 * spread + 1e-4
    assert abs(ends["nearest"].mean() - expected) > 0.05


def test_stochastic_bits_depend_on_seed_and_step_alone():
    average, model = torch.zeros(1000).bfloat16(), torch.rand(1000).bfloat16()

    def moved(seed, step):
        result = [average.clone()]
        nf.ema_multi_avg_fn(0.9, rounding="stochastic", seed=seed)(result, [model], step)
        return result[0]

    assert torch.equal(moved(1, 2), moved(1, torch.tensor(2)))
    assert not torch.equal(moved(1, 2), moved(1, 3))
    assert not torch.equal(moved(1, 2), moved(2, 2))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"(?s)decay must be .* got 1\.5.*did you mean 'nearest'"):
        nf.ema_multi_avg_fn(1.5, rounding="nearst")
    with pytest.raises(ValueError, match="seed must be a signed 64-bit integer"):
        nf.swa_multi_avg_fn(seed=2**63)
    whole = torch.zeros(9)
    with pytest.raises(ValueError, match="starts, position 0 and starts, position 1 overlap"):
        nf.ema_multi_avg_fn()([whole[:5], whole[4:]], [torch.ones(5), torch.ones(5)], 1)
    with pytest.raises(ValueError, match="ends, position 0: shape"):
        nf.ema_multi_avg_fn()([torch.zeros(3)], [torch.ones(4)], 1)
    assert not whole.any()


def network(seed):
    torch.manual_seed(seed)
    layers = (torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    return torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)


def averaged(kind, steps=4, **options):
    models = [network(seed) for seed in range(steps)]
    result = kind(models[0], **options)
    for k, model in enumerate(models):
        model[1].num_batches_tracked += k
        model[1].running_mean += k
        result.update_parameters(model)
    return result


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("ours", [False, True])
def test_averaged_model_is_torchs(use_buffers, ours):
    multi = nf.ema_multi_avg_fn(0.5) if ours else swa_utils.get_ema_multi_avg_fn(0.5)
    options = [{"multi_avg_fn": multi}, {"avg_fn": lambda a, m, n: (a + m) / 2}]
    if not use_buffers:
        options.append({})  # the average of all
    for given in options:
        got = averaged(nf.AveragedModel, use_buffers=use_buffers, **given)
        expected = averaged(swa_utils.AveragedModel, use_buffers=use_buffers, **given)
        for (name, a), (_, b) in zip(
            got.state_dict().items(), expected.state_dict().items(), strict=True
        ):
            assert torch.allclose(a, b, atol=1e-6), name
        assert int(got.n_averaged) == 4


def test_the_count_follows_what_others_write(monkeypatch):
    reads = []
    plain = torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda x: (reads.append(1), plain(x))[1])
    model, seen = network(0), []
    average = nf.AveragedModel(model, multi_avg_fn=lambda a, m, n: seen.append(n.item()))
    for _ in range(3):
        average.update_parameters(model)
    assert seen == [1, 2]
    assert len(reads) == 3
    if torch.cuda.is_available():  # where a read waits, there is one, in the first step
        reads.clear()
        there = nf.AveragedModel(model.cuda(), device="cuda")
        for _ in range(3):
            there.update_parameters(model)
        assert len(reads) == 1
        model.cpu()
    torchs = averaged(swa_utils.AveragedModel, steps=2)
    average.load_state_dict(torchs.state_dict())
    seen.clear()
    average.update_parameters(model)
    assert set(seen) == {2} and int(average.n_averaged) == 3
    average.n_averaged.zero_()
    seen.clear()
    average.update_parameters(model)
    average.n_averaged.data.zero_()
    average.update_parameters(model)
    assert not seen  # copied
    torchs.load_state_dict(average.state_dict())


def test_functions_and_models_can_be_copied_and_pickled():
    model = averaged(nf.AveragedModel, multi_avg_fn=nf.ema_multi_avg_fn(0.5, rounding="stochastic"))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.multi_avg_fn.rounding == "stochastic"
        before = [p.clone() for p in model.parameters()]
        twin.update_parameters(network(9))
        assert int(twin.n_averaged) == 5 and int(model.n_averaged) == 4
        assert all(map(torch.equal, before, model.parameters()))


def test_the_patch_replaces_and_counts():
    names = ("get_ema_multi_avg_fn", "get_swa_multi_avg_fn")
    before = [getattr(swa_utils, name) for name in names]
    expected = averaged(swa_utils.AveragedModel, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    with nf.patch("torch_swa") as patch:
        assert isinstance(swa_utils.get_swa_multi_avg_fn(), nf.averages.MultiAverage)
        function = swa_utils.get_ema_multi_avg_fn(0.9)
        got = averaged(swa_utils.AveragedModel, multi_avg_fn=function)
        with pytest.raises(ValueError, match="Invalid decay value 2"):
            swa_utils.get_ema_multi_avg_fn(2.0)
        counted = patch.stats()
    assert counted[UPDATE] == Counts(4, {})
    assert counted["torch.optim.swa_utils:get_ema_multi_avg_fn"] == Counts(
        1, {"a decay that is no number from 0 to 1": 1}
    )
    for a, b in zip(got.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert [getattr(swa_utils, name) for name in names] == before


@pytest.mark.parametrize("use_buffers", [False, True])
def test_exact_parity_gives_torchs_bits(use_buffers):
    given = ({"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)}, {"avg_fn": torch.lerp}, {})
    given[1]["avg_fn"] = swa_utils.get_ema_avg_fn(0.9)
    for options in given[: 2 if use_buffers else 3]:
        expected = averaged(swa_utils.AveragedModel, use_buffers=use_buffers, **options)
        with nf.patch("torch_swa", "exact") as patch:
            assert patch.seams == (UPDATE,)
            got = averaged(swa_utils.AveragedModel, use_buffers=use_buffers, **options)
            passed = {} if options else {"no averaging function was given": 4}
            assert patch.stats()[UPDATE] == Counts(4 if options else 0, passed)
        for a, b in zip(got.state_dict().values(), expected.state_dict().values(), strict=True):
            assert torch.equal(a, b)
