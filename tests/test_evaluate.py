"""Evaluation against an independent loop, and what it does and does not depend on."""

import copy

import pytest
import torch
from torch import nn

from neulig_fast.neulig.engine import NeuLig
from neulig_fast.neulig.heads import Head
from neulig_fast.neulig.modes import MODES
from neulig_fast.pool import ExpertPool

TASKS, CLASSES, SAMPLES, D, N = ("left", "right"), 5, 38, 8, 3


def encoder():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, D)).double()


def make_engine(names=None, experts=N):
    pool = ExpertPool([encoder() for _ in range(experts)], names=names)
    engine = NeuLig(pool, {t: Head(torch.randn(CLASSES, D).double()) for t in TASKS}, seed=3)
    with torch.no_grad():
        engine.portland.weight.mul_(8)  # CoopVecs that differ from sample to sample
    engine.calibration = {t: torch.rand(experts).double().softmax(0) for t in TASKS}
    return engine


@pytest.fixture
def engine():
    return make_engine()


@pytest.fixture
def data():
    """Two data sets of 38 samples: the last batch is short at most sizes."""
    return {
        task: (torch.randn(SAMPLES, 3, 2, 2).double(), torch.randint(CLASSES, (SAMPLES,)))
        for task in TASKS
    }


def loaders(data, size, order=None):
    order = range(SAMPLES) if order is None else order
    order = torch.as_tensor(list(order))
    return {
        task: list(zip(images[order].split(size), labels[order].split(size), strict=True))
        for task, (images, labels) in data.items()
    }


def run(engine, batches, *args, **options):
    return engine.evaluate(batches, *args, progress=False, **options)


@torch.no_grad()
def run_expert(engine, i, images):
    module = copy.deepcopy(engine.pool.template)
    module.load_state_dict(engine.pool.state_dict(i))
    return module(images)


def run_module(engine, vector, images, head):
    module = copy.deepcopy(engine.pool.template)
    module.load_state_dict(engine.pool.blend(vector))
    with torch.no_grad():
        return head(module(images)).argmax(1)


def test_every_row_counts_what_an_independent_loop_counts(engine, data):
    batches, base = loaders(data, 16), encoder().state_dict()
    report = run(engine, batches, pretrained=base, own={"left": 2, "right": "expert0"})
    for task, own in (("left", 2), ("right", 0)):
        head, right = engine.heads[task], dict.fromkeys(report.accuracy, 0)
        task_vector = {
            k: v + 0.3 * sum(engine.pool.state_dict(i)[k] - v for i in range(N))
            for k, v in base.items()
        }
        for x, y in batches[task]:
            features = torch.stack([run_expert(engine, i, x) for i in range(N)], 1)
            w = engine.portland.coopvec(features).detach()
            dataset = engine.calibration[task]
            third = torch.full((N,), 1 / N, dtype=torch.float64)
            both = (engine.calibration["left"] + engine.calibration["right"]) / 2
            single = [run_module(engine, w[b], x[b : b + 1], head) for b in range(len(x))]
            answers = {
                "ensemble": head((w[..., None] * features).sum(1)).argmax(1),
                "expert": head(features[:, own]).argmax(1),
                "per_sample": torch.cat(single),
                "batch_mean": run_module(engine, w.mean(0), x, head),
                "first_sample": run_module(engine, w[0], x, head),
                "dataset": run_module(engine, dataset, x, head),
                "hard": head(features[:, dataset.argmax()]).argmax(1),
                "uniform": run_module(engine, third, x, head),
                "global": run_module(engine, both, x, head),
            }
            for row, state in (("pretrained", base), ("task_arithmetic", task_vector)):
                module = encoder()
                module.load_state_dict(state)
                answers[row] = head(module(x)).argmax(1)
            assert set(answers) == set(report.accuracy)
            for row, answer in answers.items():
                right[row] += int((answer == y).sum())
        for row, count in right.items():
            assert report.accuracy[row][task] == pytest.approx(100 * count / SAMPLES)
    for values in report.accuracy.values():
        assert values["mean"] == pytest.approx((values["left"] + values["right"]) / 2)


def test_what_depends_on_batches_and_what_does_not(engine, data):
    shuffled, own = torch.randperm(SAMPLES), {"left": 2, "right": 0}
    reports = [
        run(engine, loaders(data, size, order), own=own)
        for size, order in ((16, None), (7, None), (38, None), (1, None), (16, shuffled))
    ]
    first = reports[0].accuracy
    for row in ("ensemble", "per_sample", "dataset", "uniform", "hard", "global", "expert"):
        assert all(report.accuracy[row] == first[row] for report in reports[1:])
    for row in ("first_sample", "batch_mean"):
        assert any(report.accuracy[row] != first[row] for report in reports[1:])
    assert reports[4].accuracy["first_sample"] != first["first_sample"]  # order alone
    single = reports[3].accuracy
    assert single["first_sample"] == single["batch_mean"] == single["per_sample"]


def test_the_same_input_gives_the_same_report(engine, data):
    one, two = run(engine, loaders(data, 16)), run(engine, loaders(data, 16))
    assert one.accuracy == two.accuracy
    assert one.coopvec == two.coopvec
    assert one.agreement == two.agreement


def test_autocast_changes_no_report():
    heads = {"left": Head(torch.randn(40, D)), "right": Head(torch.randn(40, D))}
    engine = NeuLig(ExpertPool([encoder().float() for _ in range(N)]), heads)
    images = torch.randn(200, 3, 2, 2)
    batches = {task: [(images, torch.arange(200) % 40)] for task in heads}
    engine.calibration = {task: torch.full((N,), 1 / N) for task in heads}
    expected = run(engine, batches)
    with torch.autocast("cpu", torch.bfloat16):
        report = run(engine, batches)
    assert report.accuracy == expected.accuracy and report.agreement == expected.agreement
    assert report.coopvec == expected.coopvec


def test_coopvec_statistics(engine, data):
    report = run(engine, loaders(data, 16), own={"left": 1, "right": 2})
    for task, own in (("left", 1), ("right", 2)):
        w = engine.coopvec(data[task][0])
        stats = report.coopvec["tasks"][task]
        assert stats["max"] == pytest.approx(float(w.amax(1).mean()))
        assert stats["entropy"] == pytest.approx(float(-(w * w.log()).sum(1).mean()))
        assert stats["argmax_is_task"] == pytest.approx(float((w.argmax(1) == own).double().mean()))
        assert stats["mean"] == pytest.approx(w.mean(0).tolist())
    both = [report.coopvec["tasks"][task]["max"] for task in TASKS]
    assert report.coopvec["max"] == pytest.approx(sum(both) / 2)


def test_agreement_and_gap_are_measured_against_the_ensemble(engine, data):
    report = run(engine, loaders(data, 16))
    assert report.agreement["ensemble"]["mean"] == 100
    images, _ = data["left"]
    same = engine.ensemble(images, "left").argmax(1) == run_module(
        engine, engine.calibration["left"], images, engine.heads["left"]
    )
    assert report.agreement["dataset"]["left"] == pytest.approx(100 * float(same.double().mean()))
    gap = report.accuracy["ensemble"]["left"] - report.accuracy["dataset"]["left"]
    assert report.gap["dataset"]["left"] == pytest.approx(gap)


def test_every_expert_sees_every_image_once(engine, data):
    run(engine, loaders(data, 16))
    assert engine.cache.computed == 2 * SAMPLES


def test_a_loader_that_can_be_read_once_is_enough(engine, data):
    batches = loaders(data, 16)
    once = {task: iter(loader) for task, loader in batches.items()}
    assert run(engine, once).accuracy == run(engine, batches).accuracy


class Reader:
    """A loader that resets itself: a second ``iter`` ends the first one's reading."""

    def __init__(self, batches):
        self.batches, self.read, self.started = batches, 0, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.started += 1
        return self._batches(self.started)

    def _batches(self, own):
        for batch in self.batches:
            if own == self.started:
                self.read += 1
                yield batch


def test_no_batch_is_read_twice(engine, data):
    batches = loaders(data, 16)
    readers = {task: Reader(loader) for task, loader in batches.items()}
    assert run(engine, readers).accuracy == run(engine, batches).accuracy
    assert [reader.read for reader in readers.values()] == [3, 3]


def test_a_loader_that_serves_twice_is_read_whole_each_time(engine, data):
    batches = loaders(data, 16)
    readers = {task: Reader(loader) for task, loader in batches.items()}
    report, expected = (run(engine, b, calibration=b) for b in (readers, batches))
    assert report.settings["samples"] == dict.fromkeys(TASKS, SAMPLES)
    assert report.accuracy == expected.accuracy
    assert "oracle" in report.settings["calibration"]
    one = Reader(batches["left"])
    both = run(engine, {"left": one, "right": one})
    assert both.settings["samples"] == dict.fromkeys(TASKS, SAMPLES)


def test_modes_and_baselines(engine, data):
    report = run(engine, loaders(data, 16), modes=["dataset"])
    assert set(report.accuracy) == {"ensemble", "dataset", "uniform", "hard"}
    assert set(MODES) <= set(run(engine, loaders(data, 16)).accuracy)


def test_own_experts_are_found_by_name_or_by_order(data):
    named = run(make_engine(["right", "other", "left"]), loaders(data, 16))
    assert named.settings["own"] == {"left": "left", "right": "right"}
    ordered = run(make_engine(experts=2), loaders(data, 16))
    assert ordered.settings["own"] == {"left": "expert0", "right": "expert1"}
    unknown = run(make_engine(), loaders(data, 16))
    assert unknown.settings["own"] is None
    assert "expert" not in unknown.accuracy
    assert unknown.coopvec["argmax_is_task"] is None


def test_calibration_sets(engine, data):
    batches, fixed = loaders(data, 16), loaders(data, 5)
    report = run(engine, batches, calibration=fixed)
    engine.calibration = {task: engine.coopvec(data[task][0]).mean(0) for task in TASKS}
    stored = run(engine, batches)
    assert report.accuracy == stored.accuracy
    assert "oracle" not in report.settings["calibration"]
    assert "oracle" in run(engine, batches, calibration=batches).settings["calibration"]


def test_settings_say_how_it_was_measured(engine, data):
    settings = run(engine, loaders(data, 16), split="validation").settings
    assert settings["split"] == "validation"
    assert settings["batch_size"] == dict.fromkeys(TASKS, 16)
    assert settings["samples"] == dict.fromkeys(TASKS, SAMPLES)
    assert settings["batchnorm"] == "blend"


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(12, D), nn.BatchNorm1d(D)

    def forward(self, images):
        return self.norm(self.linear(images.flatten(1)))


def test_policies_that_are_impossible_per_sample_leave_it_out(data):
    pool = ExpertPool([Normalised().double() for _ in range(N)])
    engine = NeuLig(pool, {t: Head(torch.randn(CLASSES, D).double()) for t in TASKS})
    engine.calibration = {t: torch.rand(N).double().softmax(0) for t in TASKS}
    batches = loaders(data, 16)
    report = run(engine, batches, batchnorm="re_estimate", calibration=batches)
    assert "per_sample" not in report.accuracy
    assert "dataset" in report.accuracy
    with pytest.raises(ValueError, match="impossible per sample"):
        run(engine, batches, ["per_sample"], batchnorm="re_estimate", calibration=batches)
    one = {"left": batches["left"]}
    with pytest.raises(ValueError, match="calibration="):
        run(engine, batches, batchnorm="re_estimate", calibration=one)


@pytest.mark.parametrize("policy", ["blend", "mixture_moments", "re_estimate", "batch_statistics"])
def test_models_as_they_are_keep_their_statistics(data, policy):
    experts = [Normalised().double() for _ in range(N + 1)]
    for expert in experts:
        nn.init.normal_(expert.norm.running_mean)
        nn.init.uniform_(expert.norm.running_var, 0.3, 2)
    base = experts.pop()
    engine = NeuLig(ExpertPool(experts), {t: Head(torch.randn(CLASSES, D).double()) for t in TASKS})
    engine.calibration = {t: torch.eye(N).double()[1] for t in TASKS}
    images = data["left"][0]
    answers = {"pretrained": base, "hard": experts[1]}
    answers = {row: engine.heads["left"](m.eval()(images)).argmax(1) for row, m in answers.items()}
    batches = {"left": [(images, answers["hard"])]}
    options = {"batchnorm": policy, "calibration": None}
    if policy == "re_estimate":
        options["calibration"] = {"left": [images]}
        engine.portland.weight.detach().zero_()
        engine.portland.bias.detach().copy_(torch.tensor([0.0, 9.0, 0.0]))
    hard = run(engine, batches, ["hard"], **options)
    assert hard.accuracy["hard"]["left"] == 100
    batches = {"left": [(images, answers["pretrained"])]}
    report = run(engine, batches, ["hard"], pretrained=base.state_dict(), **options)
    assert report.accuracy["pretrained"]["left"] == 100
    assert hard.accuracy["uniform"]["left"] < 100


class Branching(nn.Module):
    """What vmap cannot batch: Python control flow that depends on values."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, D)

    def forward(self, images):
        features = self.linear(images.flatten(1))
        return features if features.sum() > 0 else 2 * features


def test_an_encoder_that_vmap_cannot_batch_is_told_before_any_work(data):
    pool = ExpertPool([Branching().double() for _ in range(N)])
    engine = NeuLig(pool, {t: Head(torch.randn(CLASSES, D).double()) for t in TASKS})
    engine.calibration = {t: torch.rand(N).double().softmax(0) for t in TASKS}
    batches = loaders(data, 16)
    with pytest.raises(ValueError, match="pass chunk=1 to run them one at a time"):
        run(engine, batches, calibration=loaders(data, 16))
    assert engine.cache.computed == 0
    assert "per_sample" in run(engine, batches, chunk=1).accuracy
    assert "per_sample" not in run(engine, batches, ["dataset"]).accuracy


def test_chunks_do_not_change_the_answers(engine, data):
    batches = loaders(data, 16)
    expected = run(engine, batches).accuracy
    assert all(run(engine, batches, chunk=chunk).accuracy == expected for chunk in (1, 3))
    with pytest.raises(ValueError, match="chunk must be a positive integer or None, got 0"):
        run(engine, batches, chunk=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loaders": [1]}, TypeError, "loaders must map tasks to their values, got list"),
        ({"own": ["left"]}, TypeError, "own must map tasks to their values, got list"),
        ({"calibration": [1]}, TypeError, "calibration must map tasks to their values, got list"),
        ({"loaders": {"left": 5}}, ValueError, "task 'left' must be iterable, got int"),
        ({"loaders": {5: []}}, ValueError, "no head for task 5"),
        ({"calibration": {"left": 5}}, ValueError, "must be re-iterable, got int"),
        ({"calibration": {"left": iter([])}}, ValueError, "must be re-iterable, got list_iterator"),
    ],
)
def test_what_is_no_loader_is_named(engine, data, arguments, error, message):
    with pytest.raises(error, match=message):
        run(engine, **{"batches": loaders(data, 16), **_renamed(arguments)})
    images, labels = data["left"]
    with pytest.raises(ValueError, match=r"images must be a tensor .*got ndarray"):
        run(engine, {"left": [(images.numpy(), labels)]})


def _renamed(arguments):
    return {"batches" if key == "loaders" else key: value for key, value in arguments.items()}


def test_every_mistake_is_listed_before_any_work(engine, data):
    batches = loaders(data, 16)
    images, labels = batches["left"][0]
    engine.calibration = {}
    with pytest.raises(ValueError) as error:
        run(
            engine,
            {"left": [(images, labels + CLASSES)], "right": [], "lefty": batches["left"]},
            ["datset"],
            own={"left": 7},
            calibration={"up": [images]},
        )
    for text in (
        "unknown mode 'datset'",
        "did you mean 'dataset'",
        "own['left'] is 7",
        "own['right'] is missing",
        "no head for task 'lefty'",
        "did you mean 'left'",
        "task 'right': the loader is empty",
        "labels must be in [0, 5)",
        "task 'left' has no calibration vector",
        "no head for task 'up'",
    ):
        assert text in str(error.value)
    assert engine.cache.computed == 0


def test_labels_out_of_range_in_a_later_batch_name_the_batch(engine, data):
    batches = loaders(data, 16)
    images, labels = batches["right"][2]
    batches["right"][2] = (images, labels - CLASSES)
    with pytest.raises(ValueError, match=r"'right': batch 2.*labels must be in"):
        run(engine, batches)


def test_no_tasks_and_a_pretrained_state_of_another_model(engine, data):
    with pytest.raises(ValueError, match="at least one task"):
        run(engine, {})
    with pytest.raises(ValueError, match=r"1\.weight is missing"):
        run(engine, loaders(data, 16), pretrained={"other": torch.zeros(1)})
    assert engine.cache.computed == 0
