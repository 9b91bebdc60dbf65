"""Training the Portland: against a naive loop, and to the bit across kills and resumes."""

import errno
import signal

import pytest
import torch
from torch.nn import functional

from neulig_fast import NeuligFastWarning, testing
from neulig_fast.neulig import checkpoint as checkpoint_module
from neulig_fast.neulig import steps, train
from neulig_fast.neulig.checkpoint import Checkpoint
from neulig_fast.neulig.heads import Head
from neulig_fast.neulig.penalty import Penalty
from neulig_fast.neulig.portland import Portland
from neulig_fast.neulig.train import FitSettings, TaskData, Trainer

N, D = 3, 7
SIZES = (25, 40, 12)  # batches of 5: the third task has the fewest, 3
CLASSES = (2, 5, 3)


def tasks(dtype=torch.float64, sizes=SIZES, views=1):
    """Data sets on which expert t is right: its features point to the class's row.

    The last three features, which no head reads, tell the data sets apart.
    """
    g = torch.Generator().manual_seed(4)
    made = []
    for t, (size, count) in enumerate(zip(sizes, CLASSES, strict=True)):
        head = torch.randn(count, D, generator=g, dtype=torch.float64)
        head[:, 4:] = 0
        labels = torch.randint(count, (views * size,), generator=g)
        features = torch.randn(views * size, N, D, generator=g, dtype=torch.float64)
        features[:, t] = 2 * head[labels] + 0.1 * features[:, t]
        features[..., 4 + t] += 1
        bias = torch.randn(count, generator=g, dtype=torch.float64) if t == 1 else None
        bias = None if bias is None else bias.to(dtype)
        made.append(
            TaskData(f"task{t}", features.to(dtype), labels, Head(head.to(dtype), bias), views)
        )
    return made


def penalty(centered=False):
    a = torch.randn(N, N, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return Penalty(a @ a.T, centered, 10.0)


def settings(**changes):
    return FitSettings(**{"epochs": 4, "batch_size": 5, "scaling": 10.0, "seed": 3, **changes})


@pytest.fixture(params=["in one operator", "one by one"])
def way(request, monkeypatch):
    """Both ways to do steps; with the operator, one round a call."""
    if request.param == "one by one":
        monkeypatch.setattr(train, "products_of", lambda *_: None)
    else:
        monkeypatch.setattr(train, "rounds_per_call", lambda *_: 1)
    return request.param


# -- case 7: the trajectory ------------------------------------------------------------------------


class NaiveAdam:
    """Adam from its paper, with default betas and epsilon."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr, self.steps = parameters, lr, 0
        self.m = [torch.zeros_like(p) for p in parameters]
        self.v = [torch.zeros_like(p) for p in parameters]

    def step(self, gradients):
        self.steps += 1
        for k, g in enumerate(gradients):
            self.m[k] = 0.9 * self.m[k] + 0.1 * g
            self.v[k] = 0.999 * self.v[k] + 0.001 * g * g
            m = self.m[k] / (1 - 0.9**self.steps)
            v = self.v[k] / (1 - 0.999**self.steps)
            with torch.no_grad():
                self.parameters[k] -= self.lr * m / (v.sqrt() + 1e-8)


def naive_loss(task, rows, weight, bias, boosting, pen):
    z = task.features[rows]
    w = functional.softmax(z.reshape(len(rows), -1) @ weight.T + bias, dim=1)
    e = torch.einsum("bn,bnd->bd", w, z)
    y = functional.normalize(e, dim=1) @ task.head.weight.T
    y = y if task.head.bias is None else y + task.head.bias
    if boosting == "supervised":
        boost = functional.nll_loss(functional.log_softmax(y, 1), task.labels[rows])
    else:
        p = functional.softmax(y, 1)
        boost = -(p * torch.log(p + 1e-6)).sum(1).mean()
    v = w - w.mean(0) if pen.centered else w
    return boost, torch.einsum("bi,ij,bj->b", v, pen.matrix, v).mean() / pen.scaling


@pytest.mark.parametrize("centered", [False, True], ids=["plain", "centered"])
@pytest.mark.parametrize("boosting", ["supervised", "entropy"])
def test_twelve_rounds_match_a_naive_loop_with_autograd(boosting, centered, way):
    """Golden case 7's subject: the steps of Adam over three data sets, in float64."""
    data, pen = tasks(), penalty(centered)
    trainer = Trainer(data, pen, settings(boosting=boosting))
    assert trainer.rounds == 3 and (trainer.cached is None) == (way == "one by one")
    portland, history = trainer.run()

    start = Portland(N, D, seed=3, dtype=torch.float64)
    parameters = [p.detach().clone().requires_grad_() for p in (start.weight, start.bias)]
    adam, terms = NaiveAdam(parameters, 1e-3), []
    trainer = Trainer(data, pen, settings(boosting=boosting))  # for its orders
    for epoch in range(4):
        trainer.epoch = epoch
        orders = [trainer._order(t) for t in range(3)]
        for k in range(3):
            for task, order in zip(data, orders, strict=True):
                rows = order[5 * k : 5 * k + 5]
                loss = naive_loss(task, rows, *parameters, boosting, pen)
                adam.step(torch.autograd.grad(sum(loss), parameters))
                terms.append([float(x.detach()) for x in loss])
    terms = torch.tensor(terms, dtype=torch.float64).view(12, 3, 2)
    for got, exact in [
        (history.boosting, terms[..., 0]),
        (history.alignment, terms[..., 1]),
        (portland.weight, parameters[0]),
        (portland.bias, parameters[1]),
    ]:
        testing.assert_within_rule(got, exact, exact, terms=36 * N * D)
    moved = (portland.weight - start.weight).abs().max()
    assert moved > 5e-3  # the comparison was of something


def test_every_epoch_draws_a_fresh_order_of_all_rows():
    trainer = Trainer(tasks(), penalty(), settings())
    orders = []
    for epoch in range(3):
        trainer.epoch = epoch
        orders += [trainer._order(0), trainer._order(1)[:25]]
        assert sorted(trainer._order(0).tolist()) == list(range(25))
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)


def test_epoch_k_uses_view_k():
    trainer = Trainer(tasks(views=2), penalty(), settings())
    assert trainer.rounds == 3
    for epoch in range(4):
        trainer.epoch = epoch
        low = 25 * (epoch % 2)
        assert sorted(trainer._order(0).tolist()) == list(range(low, low + 25))


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, _ = Trainer(tasks(), penalty(), settings()).run()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    second, _ = Trainer(tasks(), penalty(), settings()).run()
    assert torch.equal(first.weight, second.weight)
    other, _ = Trainer(tasks(), penalty(), settings(seed=4)).run()
    assert not torch.equal(first.weight, other.weight)


def test_training_learns_which_expert_to_trust():
    data = tasks(torch.float32, sizes=(200, 200, 200))
    nothing = Penalty(torch.zeros(N, N), False, 1.0)
    portland, history = Trainer(data, nothing, settings(epochs=10, lr=3e-2), data).run()
    for t, task in enumerate(data):
        right = task.head(task.features[:, t]).argmax(1) == task.labels
        assert history.validation[-1, t] >= 100 * right.double().mean() - 2
        assert (portland.coopvec(task.features).argmax(1) == t).double().mean() > 0.8  # chance: 1/3


# -- validation, patience, starts ------------------------------------------------------------------


def test_the_best_weights_are_kept_and_patience_ends_a_start():
    """Validation labels that are all wrong at the end: the first epochs are the best."""
    data = tasks(sizes=(60, 60, 60))
    wrong = [task._replace(labels=(task.labels + 1) % task.head.num_classes) for task in data]
    plan = settings(epochs=200, lr=3e-2, patience=4)
    portland, history = Trainer(data, penalty(), plan, wrong).run()
    means = history.validation.mean(1)
    best = int(means.argmax())
    assert len(means) < 200 and len(means) - 1 - best == 4
    assert len(history.boosting) == len(means) * history.rounds_per_epoch
    last_best = int((means == means.max()).nonzero()[-1])
    assert history.epoch == last_best + 1
    stopped, _ = Trainer(data, penalty(), settings(epochs=history.epoch, lr=3e-2)).run()
    assert torch.equal(portland.weight, stopped.weight)


def test_starts_are_the_fits_of_consecutive_seeds_and_the_best_is_kept():
    data = tasks(sizes=(30, 30, 30))
    validation = tasks(sizes=(31, 31, 31))
    plan = {"epochs": 3, "lr": 1e-2, "boosting": "entropy"}
    portland, history = Trainer(data, penalty(), settings(**plan, starts=3), validation).run()
    alone = [
        Trainer(data, penalty(), settings(**plan, seed=3 + k), validation).run() for k in range(3)
    ]
    scores = [float(h.validation.mean(1).max()) for _, h in alone]
    assert len(set(scores)) > 1 and history.starts == tuple(scores)
    assert history.start == scores.index(max(scores))
    kept, its_history = alone[history.start]
    assert torch.equal(portland.weight, kept.weight)
    assert torch.equal(history.boosting, its_history.boosting)
    assert torch.equal(history.validation, its_history.validation)


def test_of_equal_epochs_the_last_is_kept_and_of_equal_starts_the_first():
    """One class: every accuracy is 100 %."""
    one = [
        task._replace(labels=torch.zeros_like(task.labels), head=Head(task.head.weight[:1]))
        for task in tasks()
    ]
    _, history = Trainer(one, penalty(), settings(starts=3), one).run()
    assert history.starts == (100.0, 100.0, 100.0)
    assert (history.start, history.epoch) == (0, 4)


# -- checkpoints -----------------------------------------------------------------------------------

PLANS = {
    "plain": ({"epochs": 7}, False),
    "validated": ({"epochs": 7}, True),
    "three starts with patience": ({"epochs": 6, "starts": 3, "patience": 2, "lr": 3e-2}, True),
}


def trainer_of(plan, path=None, every=10):
    options, validated = PLANS[plan]
    data = tasks(torch.float32)
    checkpoint = None if path is None else Checkpoint(path, {"plan": plan})
    plan = settings(**options, checkpoint_every=every)
    return Trainer(data, penalty(), plan, tasks(torch.float32) if validated else (), checkpoint)


def same(one, other):
    (a, h), (b, k) = one, other
    assert torch.equal(a.weight, b.weight) and torch.equal(a.bias, b.bias)
    for key in ("boosting", "alignment", "validation"):
        assert torch.equal(getattr(h, key), getattr(k, key)), key
    assert (h.epoch, h.start, h.starts) == (k.epoch, k.start, k.starts)


@pytest.mark.parametrize("plan", PLANS)
def test_an_interrupted_fit_resumes_to_the_same_bits(plan, tmp_path, way):
    """Interrupted after every single epoch, each time by a new trainer, until it gets through."""
    whole = trainer_of(plan).run()
    path, calls = tmp_path / "fit.safetensors", 0

    def interrupt(report):
        nonlocal calls
        calls += 1
        raise KeyboardInterrupt

    while True:
        try:
            resumed = trainer_of(plan, path).run(interrupt)
            break
        except KeyboardInterrupt:
            assert path.exists()
    assert calls >= 7
    same(whole, resumed)
    same(whole, trainer_of(plan, path).run(interrupt))  # finished: nothing left to do


def test_an_interrupt_in_the_middle_of_an_epoch_loses_only_that_epoch(tmp_path, monkeypatch, way):
    whole = trainer_of("validated").run()
    path, calls = tmp_path / "fit.safetensors", 0
    name, each = ("_step", 9) if way == "one by one" else ("_run_rounds", 3)  # calls an epoch
    original = getattr(Trainer, name)

    def counted(self, *args):
        nonlocal calls
        calls += 1
        if calls == 3 * each + 2:
            raise KeyboardInterrupt
        original(self, *args)

    monkeypatch.setattr(Trainer, name, counted)
    with pytest.raises(KeyboardInterrupt):
        trainer_of("validated", path).run()
    assert Checkpoint(path, {"plan": "validated"}).read()[1]["epoch"] == 3
    same(whole, trainer_of("validated", path).run())


def test_a_fit_begun_one_by_one_is_finished_in_one_operator(tmp_path, monkeypatch):
    """A checkpoint says nothing of how steps were done; older ones hold the same tensors."""

    def interrupt(report):
        if report.epoch == 3:
            raise KeyboardInterrupt

    path = tmp_path / "fit.safetensors"
    with monkeypatch.context() as one_by_one:
        one_by_one.setattr(train, "products_of", lambda *_: None)
        whole, history = trainer_of("plain").run()
        with pytest.raises(KeyboardInterrupt):
            trainer_of("plain", path).run(interrupt)
    resumed, other = trainer_of("plain", path).run()
    assert torch.equal(other.boosting[:9], history.boosting[:9])
    assert not torch.equal(resumed.weight, whole.weight)  # the other way has other bits
    testing.assert_within_rule(resumed.weight, whole.weight, whole.weight.double(), 63 * N * D)


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
import test_train
def die(report):
    if report.epoch == 3:
        os.kill(os.getpid(), signal.SIGKILL)
test_train.trainer_of("validated", sys.argv[1], every=2).run(die)
"""


def test_a_killed_process_resumes_to_the_same_bits(python, tmp_path):
    path = tmp_path / "fit.safetensors"
    done = python(KILLED, path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    _, progress = Checkpoint(path, {"plan": "validated"}).read()
    assert progress["epoch"] == 2
    same(trainer_of("validated").run(), trainer_of("validated", path).run())


def test_a_checkpoint_of_another_fit_lists_the_differences(tmp_path):
    path = tmp_path / "fit.safetensors"
    Checkpoint(path, {"lr": 0.1, "seed": 0, "epochs": 3}).write({"x": torch.ones(1)}, {"epoch": 1})
    with pytest.raises(ValueError, match=r"another fit \(delete it to start anew\): 2 problems"
                       r"(.|\n)*lr was 0.1, is 0.2(.|\n)*starts was None, is 2"):  # fmt: skip
        Checkpoint(path, {"lr": 0.2, "seed": 0, "epochs": 3, "starts": 2}).read()


def test_in_a_folder_every_fit_has_a_file_of_its_own(tmp_path):
    for lr in (0.1, 0.2):
        Checkpoint(tmp_path, {"lr": lr}).write({"x": torch.ones(1)}, {"epoch": lr})
    assert len(list(tmp_path.glob("fit-*.safetensors"))) == 2
    assert Checkpoint(tmp_path, {"lr": 0.2}).read()[1] == {"epoch": 0.2}
    assert Checkpoint(tmp_path, {"lr": 0.3}).read() is None


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left")


def test_a_full_disk_does_not_end_the_fit(tmp_path, monkeypatch):
    whole = trainer_of("validated").run()
    monkeypatch.setattr(checkpoint_module, "write_safetensors", full_disk)
    with pytest.warns(NeuligFastWarning, match="No space left.*the fit goes on"):
        same(whole, trainer_of("validated", tmp_path / "fit.safetensors").run())


def test_a_full_disk_does_not_hide_an_interrupt(tmp_path, monkeypatch):
    def interrupt(report):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module, "write_safetensors", full_disk)
    with pytest.warns(NeuligFastWarning), pytest.raises(KeyboardInterrupt):
        trainer_of("plain", tmp_path / "fit.safetensors").run(interrupt)


# -- what is not finite ----------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_task_and_epoch_and_keeps_the_epochs_before(tmp_path, way):
    """The features of the second task are spoilt in the third epoch: zeros have no direction, and
    NaN is one also to who has their products with the head already."""
    data, checkpoint = tasks(torch.float32), Checkpoint(tmp_path / "fit.safetensors", {})
    trainer = Trainer(data, penalty(), settings(), checkpoint=checkpoint)

    def spoil(report):
        if report.epoch == 2:
            data[1].features.fill_(0.0 if way == "one by one" else torch.nan)

    with pytest.raises(
        ValueError, match="epoch 3, lr 0\\.001, the loss of task 'task1' is not finite"
    ):
        trainer.run(spoil)
    tensors, progress = checkpoint.read()
    assert progress["epoch"] == 2 and tensors["weight"].isfinite().all()


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_features_that_are_wrong_from_the_start_are_an_error(value, way):
    data = tasks(torch.float32)
    data[2].features[:] = value
    with pytest.raises(ValueError, match=r"epoch 1, lr 0\.001, the loss of task 'task2'"):
        Trainer(data, penalty(), settings()).run()


def test_weights_that_are_not_finite_are_found_although_the_losses_are(monkeypatch, way):
    """After the last step: no loss has seen them."""
    rounds, original = 0, Trainer._run_rounds

    def spoil_the_last(self, rows, terms):
        nonlocal rounds
        original(self, rows, terms)
        rounds += len(terms)
        if rounds == self.rounds:
            self.portland.weight.data[0, 0] = torch.inf

    monkeypatch.setattr(Trainer, "_run_rounds", spoil_the_last)
    with pytest.raises(ValueError, match=r"in epoch 1, .* weights are not finite"):
        Trainer(tasks(), penalty(), settings(epochs=1)).run()


# -- two ways to do steps --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("views", [1, 2])
def test_both_ways_go_the_same_way(dtype, views, monkeypatch):
    """The steps one by one are the working arithmetic, on features of every type."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    data = tasks(acc, views=views)
    data = [task._replace(features=task.features.to(dtype)) for task in data]
    exact_data = [
        task._replace(features=task.features.double(), head=task.head.to("cpu", torch.float64))
        for task in data
    ]
    trainer = Trainer(data, penalty(), settings(epochs=8))
    assert trainer.cached is not None
    together, history = trainer.run()
    monkeypatch.setattr(train, "products_of", lambda *_: None)
    apart, other = Trainer(data, penalty(), settings(epochs=8)).run()
    exact, oracle = Trainer(exact_data, penalty(), settings(epochs=8)).run()
    count = 72 * N * D
    testing.assert_within_rule(together.weight, apart.weight, exact.weight, count)
    testing.assert_within_rule(together.bias, apart.bias, exact.bias, count)
    testing.assert_within_rule(history.boosting, other.boosting, oracle.boosting, count)
    testing.assert_within_rule(history.alignment, other.alignment, oracle.alignment, count)


def test_chunks_of_an_epoch_give_the_bits_of_the_whole(monkeypatch):
    whole = trainer_of("validated").run()
    for rounds in (1, 2):
        monkeypatch.setattr(train, "rounds_per_call", lambda *_, rounds=rounds: rounds)
        same(whole, trainer_of("validated").run())


def test_heads_of_many_classes_are_used_themselves(monkeypatch):
    """Products are kept up to four times the features' bytes, and up to a number of them."""
    data = tasks(torch.float32)
    assert Trainer(data, penalty(), settings()).cached is not None
    wide = [task._replace(head=Head(torch.randn(4 * D, D))) for task in data]
    trainer = Trainer(wide, penalty(), settings())
    assert trainer.cached is None
    trainer.run()
    monkeypatch.setattr(steps, "_MOST_BYTES", 1000)
    assert Trainer(data, penalty(), settings()).cached is None


def test_products_are_made_only_if_rows_are_read_often_enough():
    """An epoch reads 45 rows of 77; three read less than twice 77, and four more."""
    assert Trainer(tasks(), penalty(), settings(epochs=3)).cached is None
    assert Trainer(tasks(), penalty(), settings(epochs=4)).cached is not None
    assert Trainer(tasks(), penalty(), settings(epochs=2, starts=2)).cached is not None
    assert Trainer(tasks(views=3), penalty(), settings(epochs=4)).cached is None


def test_a_call_is_short():
    """Rounds per call shrink with the size of a step, to one at least."""
    z, head = torch.empty(1, 5, 512), Head(torch.ones(100, 512))
    task = TaskData("task", z, None, head)
    assert 100 < steps.rounds_per_call([task], 128) < 2000
    assert steps.rounds_per_call([task] * 4, 128) < steps.rounds_per_call([task], 128) / 3
    assert steps.rounds_per_call([task], 1 << 30) == 1


def test_the_fitted_portland_owns_its_memory():
    portland, _ = trainer_of("plain").run()
    for parameter in portland.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


# -- files that are none ---------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"not safetensors"])
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    path = tmp_path / "fit.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint .*fit.safetensors cannot be read"):
        Checkpoint(path, {}).read()


def test_the_callback_is_told_the_truth():
    reports = []
    data = tasks()
    _, history = Trainer(data, penalty(), settings(), data).run(reports.append)
    assert [r.epoch for r in reports] == [1, 2, 3, 4]
    for report in reports:
        rounds = slice(3 * report.epoch - 3, 3 * report.epoch)
        assert report.boosting == pytest.approx(float(history.boosting[rounds].mean()))
        assert report.alignment == pytest.approx(float(history.alignment[rounds].mean()))
        assert report.accuracy == float(history.validation[report.epoch - 1].mean())
