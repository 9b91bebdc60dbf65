"""The Triton launchers of NeuLig's loss, its gradient and its training, called directly.

On a machine without a GPU the kernels run in Triton's interpreter, on CPU tensors: what test_house
asks of every backend is asked there, so here is what is peculiar to these kernels.
"""

import contextlib
import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from neulig_fast import testing
from neulig_fast.kernels import _launch, _logits
from neulig_fast.kernels import neulig_fit as fit_module
from neulig_fast.kernels import neulig_loss as loss_module
from neulig_fast.kernels import neulig_loss_backward as gradient_module
from neulig_fast.ops.neulig_fit import neulig_fit_reference
from neulig_fast.ops.neulig_loss import neulig_loss_reference
from neulig_fast.ops.neulig_loss_backward import neulig_loss_backward_reference

sys.path.insert(0, str(Path(__file__).parent))  # tests are no package

from test_neulig_fit import CASES, Fit, fit

DEVICE = "cpu" if _launch.INTERPRETED else "cuda"
RUNS = _launch.INTERPRETED or (_launch.MISSING is None and torch.cuda.is_available())
needs_triton = pytest.mark.skipif(not RUNS, reason=_launch.MISSING or "no GPU, not interpreted")
pytestmark = needs_triton
CANARY = 12345.0


def on_device(args):
    return testing.map_tensors(args, lambda a: a.to(DEVICE))


def draw(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def fenced(*shape, dtype=torch.float32):
    """A tensor in the middle of a bigger buffer of canaries, and that buffer."""
    count = torch.Size(shape).numel()
    buffer = torch.full((count + 256,), CANARY, device=DEVICE, dtype=dtype)
    return buffer[128 : 128 + count].view(shape), buffer


def assert_intact(inner, buffer):
    outside = torch.cat([buffer[:128], buffer[128 + inner.numel() :]])
    assert (outside == CANARY).all() and not (inner == CANARY).any()


# -- the loss and its gradient ---------------------------------------------------------------------


def loss_arguments(
    B=17, N=5, D=40, C=40, *, supervised=True, normalize=True, centered=False, biased=True,
    dtype=torch.float32,
):  # fmt: skip
    """Several blocks of samples and of columns, and several tiles of classes, none of them full."""
    targets = torch.arange(B, device=DEVICE) * 7 % C if supervised else None
    A = draw(N, N, seed=6)
    return (
        draw(B, N, D, dtype=dtype), draw(N, N * D, seed=1) / D, draw(N, seed=2),
        draw(C, D, dtype=dtype, seed=3), draw(C, seed=4) if biased else None, targets, A @ A.T,
        "supervised" if supervised else "entropy", 10.0, normalize, centered,
    )  # fmt: skip


def gradient_arguments(args, coopvec, needs=(True,) * 6):
    grads = [draw(seed=k) for k in (7, 8, 9)] + [draw(*coopvec.shape, seed=10)]
    z, W, _, H, h, t, A, *settings = args
    needs = [need and (k != 4 or h is not None) for k, need in enumerate(needs)]
    return (*grads, coopvec, z, W, H, h, t, A, *settings, needs)


def assert_close(got, reference, args):
    terms = args[5 if len(args) > 12 else 0].numel()  # of the features
    working = reference(*args)
    exact = reference(*testing.cast(args, torch.float64))
    for a, b, c in zip(got, working, exact, strict=True):
        testing.assert_within_rule(a, b, c, terms)


LOSSES = {
    "supervised": {},
    "entropy": {"supervised": False},
    "centered, not normalised": {"centered": True, "normalize": False, "biased": False},
    "entropy, centered": {"supervised": False, "centered": True, "B": 16},
    "one expert": {"N": 1},
    "nine experts": {"N": 9, "B": 3},
    "64 experts": {"N": 64, "B": 3, "D": 5, "centered": True},
    "one sample": {"B": 1, "centered": True},
    "one class": {"C": 1},
    "one column": {"D": 1, "normalize": False},
    "whole tiles": {"B": 32, "N": 4, "D": 64, "C": 64},
}


@pytest.mark.parametrize("case", LOSSES)
def test_loss_and_gradients_obey_the_tolerance_rule(case):
    args = loss_arguments(**LOSSES[case])
    got = loss_module.neulig_loss(*args)
    assert_close(got, neulig_loss_reference, args)
    args = gradient_arguments(args, got[3])
    assert_close(gradient_module.neulig_loss_backward(*args), neulig_loss_backward_reference, args)


@pytest.mark.parametrize("used", range(4))
def test_gradients_of_one_output_alone(used):
    """The other three incoming gradients are None."""
    args = loss_arguments(B=3, D=5, C=6)
    grads, rest = [None] * 4, gradient_arguments(args, neulig_loss_reference(*args)[3])[4:]
    grads[used] = draw(3, 5) if used == 3 else draw()
    args = (*grads, *rest)
    got = torch.cat([g.flatten() for g in gradient_module.neulig_loss_backward(*args)])
    working = torch.cat([g.flatten() for g in neulig_loss_backward_reference(*args)])
    exact = neulig_loss_backward_reference(*testing.cast(args, torch.float64))
    # All at one scale: some of them cancel to nearly nothing.
    exact = torch.cat([g.flatten() for g in exact])
    testing.assert_within_rule(got, working, exact, rest[1].numel())


@pytest.mark.parametrize("supervised", [True, False], ids=["supervised", "entropy"])
def test_tiles_are_joined_in_any_number_at_once(monkeypatch, supervised):
    args = loss_arguments(C=130, B=3, supervised=supervised)
    for module in (loss_module, gradient_module):
        monkeypatch.setattr(module, "tiles_at_once", lambda tiles: 2)
    got = loss_module.neulig_loss(*args)
    assert_close(got, neulig_loss_reference, args)
    args = gradient_arguments(args, got[3])
    assert_close(gradient_module.neulig_loss_backward(*args), neulig_loss_backward_reference, args)


@pytest.mark.parametrize("supervised", [True, False], ids=["supervised", "entropy"])
def test_classes_of_bias_minus_infinity_do_not_exist(supervised):
    """Also where they fill a whole tile."""
    args = list(loss_arguments(supervised=supervised))
    some = 10
    args[5] = args[5] % some if supervised else None
    less = (*args[:3], args[3][:some], args[4][:some], *args[5:])
    args[4] = args[4].clone()
    args[4][some:] = -torch.inf
    got, expected = loss_module.neulig_loss(*args), loss_module.neulig_loss(*less)
    for a, b in zip(got, expected, strict=True):
        testing.assert_within_rule(a, b, b.double(), args[3].shape[1])


def test_small_losses_keep_their_digits():
    """Logits of a hundred, and a loss of exp(-8): the maximum is subtracted before any sum."""
    z, W, c = torch.ones(3, 2, 4), torch.zeros(2, 8), torch.zeros(2)
    head = torch.tensor([[25.0] * 4, [23.0] * 4])
    tensors = (z, W, c, head, None, torch.zeros(3, dtype=torch.int64), torch.zeros(2, 2))
    args = (*tensors, "supervised", 10.0, False, False)
    loss, *_ = loss_module.neulig_loss(*on_device(args))
    exact = torch.tensor(-8.0, dtype=torch.float64).exp().log1p()
    testing.assert_within_rule(loss, neulig_loss_reference(*args)[0], exact)


@pytest.mark.parametrize("wrong", [40, -(2**40)])
def test_a_target_that_is_no_class_is_seen_in_the_loss_and_its_gradient(wrong):
    args = list(loss_arguments())
    args[5] = args[5].clone()
    args[5][16] = wrong
    loss, boosting, alignment, coopvec = loss_module.neulig_loss(*args)
    assert loss.isnan() and boosting.isnan()
    assert alignment.isfinite() and coopvec.isfinite().all()
    gradients = gradient_module.neulig_loss_backward(*gradient_arguments(args, coopvec))
    assert gradients[0][16].isnan().all() and gradients[0][:16].isfinite().all()
    assert gradients[1].isnan().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_sample_that_is_not_finite_is_one_sample_alone(value):
    args = loss_arguments()
    args[0][3, 2, 30] = value
    loss, boosting, alignment, coopvec = loss_module.neulig_loss(*args)
    assert not any(x.isfinite() for x in (loss, boosting, alignment))
    assert not coopvec[3].isfinite().any()
    assert coopvec[:3].isfinite().all() and coopvec[4:].isfinite().all()


@pytest.mark.parametrize("N", [5, 16])
def test_the_bits_of_a_coopvec_do_not_depend_on_its_neighbours(N):
    args = loss_arguments(N=N)
    together = loss_module.neulig_loss(*args)[3]
    part = (args[0][7:12].contiguous(), *args[1:5], args[5][7:12], *args[6:])
    assert torch.equal(loss_module.neulig_loss(*part)[3], together[7:12])


@pytest.mark.parametrize("centered", [False, True])
def test_the_loss_writes_its_results_and_nothing_else(centered):
    z, W, c, H, h, t, A, _, scaling, _, _ = loss_arguments(B=17)
    (coopvec, fence), results = fenced(17, 5), [fenced() for _ in range(3)]
    kept = loss_module.scratch(coopvec, H, True, True)
    fences = {name: fenced(*tensor.shape) for name, tensor in kept._asdict().items()}
    kept = _logits.Scratch(**{name: inner for name, (inner, _) in fences.items()})
    launch = _launch.config("neulig_loss", z.dtype, 5, 1)
    inputs = (z, W, c, H, A)
    _launch.run(
        z,
        loss_module.launches(
            inputs, h, t, coopvec, [r for r, _ in results], kept, scaling, centered, launch
        ),
    )
    for inner, buffer in ((coopvec, fence), *results, *fences.values()):
        assert_intact(inner, buffer)


@pytest.mark.parametrize(
    "needs, kernels",
    [
        ([True] * 6, ["products", "pull", "portland", "products", "features"]),
        ([False, True, False, False, False, False], ["pull", "portland", "products"]),
        ([False, False, True, False, False, False], ["pull", "portland", "products"]),
        ([True, False, False, False, False, False], ["pull", "portland", "features"]),
        ([False, False, False, True, False, False], ["products"]),
    ],
)
def test_only_what_is_needed_is_launched(needs, kernels):
    args = gradient_arguments(loss_arguments(B=3), torch.full((3, 5), 0.2, device=DEVICE), needs)
    grads, (w, z, W, H, h, t, A) = args[:4], args[4:11]
    inputs = gradient_module.Inputs(grads, w, z, W, H, h, t, A)
    launch = _launch.config("neulig_loss_backward", z.dtype, 5, 1)
    _, found = gradient_module.plan(inputs, 10.0, True, False, needs, launch)
    names = [launch.kernel.__name__.removeprefix("neulig_loss_")[:-7] for launch in found]
    assert names == ["ensemble", "classes", "slope", *kernels]
    got = gradient_module.neulig_loss_backward(*args)
    expected = neulig_loss_backward_reference(*args)
    assert [g.numel() for g in got] == [g.numel() for g in expected]


@pytest.mark.parametrize(
    "change, reason",
    [
        ({0: torch.zeros(17, 40, 5).mT}, "features must be contiguous"),
        ({1: torch.zeros(200, 5).T, 3: torch.zeros(40, 40).T}, "portland_weight, head_weight must"),
        ({0: torch.zeros(2, 65, 3)}, "65 experts, more than 64"),
    ],
)
def test_what_the_kernels_cannot_take_they_say(change, reason):
    args = [change.get(k, a) for k, a in enumerate(loss_arguments())]
    args = on_device(args)
    with pytest.raises(ValueError, match=f"neulig_loss: {reason}"):
        loss_module.neulig_loss(*args)
    with pytest.raises(ValueError, match=f"neulig_loss_backward: {reason}"):
        gradient_module.neulig_loss_backward(*gradient_arguments(args, args[0][..., 0]))


# -- training --------------------------------------------------------------------------------------

TRAJECTORIES = {
    "entropy, centered": {},
    "one row": {},
    "one class": {},
    "many columns": {"rounds": 1},
    "several groups": {},
    "9 experts": {},
    "64 experts": {"rounds": 1},
}


@pytest.mark.parametrize("case", TRAJECTORIES)
def test_the_trajectory_is_autograds_and_torchs_adam(case):
    """Parameters, both moments and both loss terms, each by the rule at its own scale."""
    one = fit(case, **TRAJECTORIES[case], dtype=torch.float32)
    args = one.arguments()
    state, terms = fit_module.neulig_fit(*on_device(args))
    exact_state, exact_terms = one.naive()
    working_state, working_terms = neulig_fit_reference(*args)
    count = one.features[0][0].numel() * one.rounds * len(one.tasks)
    for got, working, exact in zip(state, working_state, exact_state, strict=True):
        testing.assert_within_rule(got, working, exact, count)
    for k in range(2):
        testing.assert_within_rule(terms[..., k], working_terms[..., k], exact_terms[..., k], count)


@pytest.mark.skipif(not _launch.INTERPRETED, reason="a GPU adds in the order of its threads")
@pytest.mark.parametrize("n", [2, 16])
def test_no_sample_sees_those_that_share_its_program(n):
    """The same bits with one in a program, as compiled for a GPU, and with eight."""
    one = Fit(CASES["two tasks"][0], n=n, rounds=1, dtype=torch.float32)
    args = on_device(one.arguments())
    launch = _launch.config("neulig_fit", torch.float32, n, 1)
    few, many = (
        fit_module.neulig_fit(*args, dataclasses.replace(launch, held=held)) for held in (1, 8)
    )
    assert all(torch.equal(a, b) for a, b in zip(few, many, strict=True))


def test_fits_go_on_where_they_stopped():
    """Two rounds and one, with the step's number and the state handed on: the same bits."""
    one = fit("two tasks", dtype=torch.float32)
    state, terms = fit_module.neulig_fit(*on_device(one.arguments()))
    first, rest = ([rows[k] for rows in one.rows] for k in (slice(8), slice(8, None)))
    middle, before = fit_module.neulig_fit(*on_device(one.arguments(rows=first)))
    end, after = fit_module.neulig_fit(*on_device(one.arguments(middle, rest, 4)))
    assert torch.equal(end, state) and torch.equal(torch.cat((before, after)), terms)


def test_no_rows_are_no_rounds():
    args = on_device(fit("two tasks").arguments(rows=[torch.zeros(0).long()] * 2))
    state, terms = fit_module.neulig_fit(*args)
    assert torch.equal(state, args[0]) and terms.shape == (0, 2, 2)
    assert state.data_ptr() != args[0].data_ptr()


@pytest.mark.parametrize("rows, wrong", [(True, 30), (True, -1), (False, 23), (False, -1)])
def test_a_row_or_a_label_that_is_not_there_is_seen_in_the_loss(rows, wrong):
    """On a GPU nobody looks at them before: what is read is inside, and the loss is NaN.

    Of rows that of the entropy, which no label makes NaN.
    """
    one = fit("two tasks", supervised=not rows, dtype=torch.float32)
    if rows:
        one.rows[1][5] = wrong
    else:
        one.labels[1][one.rows[1][5]] = wrong
    _, terms = fit_module.neulig_fit(*on_device(one.arguments()))
    assert terms[0].isfinite().all() and terms[1, 1, 0].isnan()


def test_a_fit_writes_its_results_and_nothing_else():
    one = fit("two tasks", dtype=torch.float32)
    first, *lists, alignment, step, batch, lr, scaling, centered = on_device(one.arguments())
    (state, fence), (terms, other) = fenced(*first.shape), fenced(one.rounds, 2, 2)
    state.copy_(first)
    kept = fit_module.scratch(state, 3, batch, step, 2 * one.rounds, lr)
    fences = [fenced(*tensor.shape) for tensor in kept[2:]]
    kept = (*kept[:2], *(inner for inner, _ in fences))
    launch = _launch.config("neulig_fit", torch.float32, 3, 1)
    settings = (batch, scaling, centered, launch)
    found = fit_module.round_launches(state, lists, alignment, kept, terms, *settings)
    _launch.repeat(state, found, one.rounds)
    for inner, buffer in ((state, fence), (terms, other), *fences):
        assert_intact(inner, buffer)
    expected, _ = fit_module.neulig_fit(*on_device(one.arguments()))
    assert torch.equal(state, expected)


# -- launches that repeat --------------------------------------------------------------------------


class Recorder:
    """A CUDA graph and a kernel in one: what is launched, and what is launched by replays."""

    def __init__(self):
        self.launched = self.recorded = 0
        self.recording = False

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **options):
        if self.recording:
            self.recorded += 1
        else:
            self.launched += 1

    def capture_begin(self, **options):
        assert self.launched, "a recording cannot compile"
        self.recording = True

    def capture_end(self):
        self.recording = False

    def replay(self):
        self.launched += self.recorded


@pytest.mark.parametrize("capturing", [False, True], ids=["", "in somebody else's recording"])
def test_repeated_launches_are_as_many_as_asked_for(monkeypatch, capturing):
    """With CUDA's graphs and streams played by stand-ins: directly, recorded and replayed."""
    params = type("OnAGpu", (), {"is_cuda": True})()
    nothing = {name: lambda *_: contextlib.nullcontext() for name in ("device_of", "stream")}
    for name, stand_in in {**nothing, "Stream": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    for count in (1, 2, 10, 100):
        for times in (1, 2, 3, 16, 17, 33, 100):
            recorder = Recorder()
            monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda found=recorder: found)
            launches = [_launch.Launch(recorder, 1, (), {})] * count
            _launch.repeat(params, launches, times)
            assert recorder.launched == count * times
            assert not (capturing and recorder.recorded)
