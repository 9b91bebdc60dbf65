"""Reports: round trip, tables, verdicts and figures."""

import io
import json

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from neulig_fast.experiment import guesses
from neulig_fast.neulig import figures
from neulig_fast.neulig.history import History
from neulig_fast.neulig.report import ROWS, Report, compare
from neulig_fast.neulig.tally import TaskTally

TASKS = ("digits", "letters", "shapes")


def tally(own, answers, labels, coopvec):
    counted = TaskTally(3, own)
    half = len(labels) // 2
    for part in (slice(None, half), slice(half, None)):
        counted.add({row: a[part] for row, a in answers.items()}, labels[part], coopvec[part])
    return counted


def make_report(sharpness=0.9, wrong=None, samples=200):
    """A report whose rows are wrong for the given numbers of images."""
    wrong = wrong or {"ensemble": 14, "per_sample": 16, "dataset": 10, "hard": 15, "uniform": 110}
    labels = torch.arange(samples) % 4
    tallies = {}
    for own, task in enumerate(TASKS):
        answers = {}
        for row, count in wrong.items():
            answers[row] = labels.clone()
            answers[row][:count] += 1
        coopvec = torch.full((samples, 3), (1 - sharpness) / 2)
        coopvec[:, own] = sharpness
        tallies[task] = tally(own, answers, labels, coopvec)
    rounds = torch.linspace(3, 0.1, 2500)[:, None].expand(2500, 3)
    history = History(TASKS, rounds, rounds / 50, torch.zeros(0, 3), epoch=100)
    settings = {
        "split": "test",
        "experts": list(TASKS),
        "own": dict(zip(TASKS, TASKS, strict=True)),
    }
    return Report.from_tallies(tallies, settings, 1.5, history)


def text_of(renderable, width=100):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_accuracy_is_100_correct_over_samples_and_means_are_unweighted():
    labels = torch.tensor([0, 1, 2, 3])
    coopvec = torch.eye(3)[[0, 1, 2, 0]]
    exact = tally(0, {"ensemble": labels}, labels, coopvec)
    long = torch.zeros(10, dtype=torch.int64)
    half = long.clone()
    half[:5] = 1
    other = tally(1, {"ensemble": half}, long, torch.full((10, 3), 1 / 3))
    report = Report.from_tallies({"a": exact, "b": other}, {"split": "test"}, 0.0)
    assert report.accuracy["ensemble"] == {"a": 100.0, "b": 50.0, "mean": 75.0}
    assert report.coopvec["max"] == pytest.approx((1 + 1 / 3) / 2)
    assert report.coopvec["entropy"] == pytest.approx(np.log(3) / 2)
    assert report.coopvec["tasks"]["a"]["argmax_is_task"] == 0.5
    assert report.coopvec["tasks"]["a"]["mean"] == [0.5, 0.25, 0.25]


def test_json_round_trip_and_keys(tmp_path):
    report = make_report()
    report.to_json(tmp_path / "report.json")
    assert Report.from_json(tmp_path / "report.json") == report
    content = json.loads((tmp_path / "report.json").read_text())
    assert {"tasks", "accuracy", "coopvec", "seconds", "settings"} <= set(content)
    assert set(content["accuracy"]["ensemble"]) == {*TASKS, "mean"}
    assert {"max", "entropy", "argmax_is_task"} <= set(content["coopvec"])
    assert content["gap"]["dataset"]["mean"] == pytest.approx(-2)
    assert content["gap_is"] == "ensemble minus row, in points: above zero the row is behind"
    mean = {row: values["mean"] for row, values in content["accuracy"].items()}
    for row, values in content["gap"].items():  # what the sentence says
        assert values["mean"] == pytest.approx(mean["ensemble"] - mean[row])


def test_a_long_history_is_thinned_to_means_and_survives_nan(tmp_path):
    report = make_report()
    points = report.history["boosting"]
    assert len(points) <= 1000
    assert np.mean(points[:-1]) == pytest.approx(3 - 2.9 * 0.5, rel=0.01)
    assert report.history["rounds_per_point"] == 3
    nan = torch.full((4, 3), torch.nan)
    broken = History(TASKS, nan, nan, torch.zeros(0, 3), epoch=1)
    labels = torch.zeros(2, dtype=torch.int64)
    counted = {"a": tally(0, {"ensemble": labels}, labels, torch.eye(3)[:2])}
    settings = {"split": "test", "experts": list(TASKS), "own": None}
    report = Report.from_tallies(counted, settings, 0.0, broken)
    report.to_json(tmp_path / "report.json")
    assert Report.from_json(tmp_path / "report.json").history["boosting"][0] == [None] * 3
    assert len(report.plot(tmp_path)) == 3


def test_files_that_are_no_reports(tmp_path):
    path = tmp_path / "other.json"
    path.write_text('{"tasks": []}')
    with pytest.raises(ValueError, match="accuracy, agreement, coopvec"):
        Report.from_json(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="not a report"):
        Report.from_json(path)


def test_table_shows_every_row_and_fits_a_terminal():
    report = make_report()
    text = text_of(report.table(), width=80)
    for row in report.accuracy:
        assert ROWS[row].name in text
    for shown in (*TASKS, "95.0", "+2.0", "−48.0"):
        assert shown in text
    assert "…" not in text


def test_rich_print_ends_with_the_verdict():
    report = make_report()
    text = " ".join(text_of(report).split())
    assert text.endswith(" ".join(report.verdict().split()))


def test_rows_come_in_display_order():
    assert list(make_report().accuracy) == ["uniform", "hard", "ensemble", "per_sample", "dataset"]


def test_compare_puts_settings_side_by_side():
    other = make_report(0.5, {"ensemble": 20, "per_sample": 20})
    text = text_of(compare({"paper": make_report(), "default": other}))
    lines = {" ".join(line.split()[:3]): line for line in text.splitlines() if line.strip()}
    assert "92.0 (−1.0)" in lines["merged per sample"]
    assert "90.0 (0.0)" in lines["merged per sample"]
    assert lines["merged per data"].rstrip().endswith("-")
    assert "0.90" in text and "0.50" in text


# -- verdict -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sharpness", "words"),
    [
        (0.99, "The CoopVecs routed:"),
        (0.85, "The CoopVecs mostly routed:"),
        (0.5, "The CoopVecs mixed the experts:"),
        (0.34, "The CoopVecs stayed close to uniform:"),
    ],
)
def test_verdict_says_routing_or_mixing(sharpness, words):
    text = make_report(sharpness).verdict()
    assert text.startswith(words)
    assert f"largest weight is {sharpness:.2f}" in text
    assert "100.0 % of the images" in text


@pytest.mark.parametrize(
    ("hard", "dataset", "sharpness", "words"),
    [
        (16, 16, 0.9, "level with it, within that error: here merging is in effect routing."),
        (17, None, 0.9, "0.5 points above it, within that error: here merging is in effect"),
        (17, 17, 0.5, "merging per data set is level with it, within that error."),
        (80, 80, 0.9, "32.0 points above it, beyond that error, and merging per data set is level"),
        (2, 16, 0.9, "merging per data set is 7.0 points below it, beyond that error: here mixing"),
        (
            16,
            50,
            0.9,
            "17.0 points below it, beyond that error: here mixing per data set costs.",
        ),
        (16, 6, 0.9, "merging per data set is 5.0 points above it, beyond that error."),
    ],
)
def test_verdict_compares_with_hard_routing(hard, dataset, sharpness, words):
    """Merging is in effect routing only where every way to merge is."""
    wrong = {"ensemble": 14, "per_sample": 16, "dataset": dataset, "hard": hard, "uniform": 110}
    wrong = {row: count for row, count in wrong.items() if count is not None}
    text = make_report(sharpness, wrong).verdict()
    assert words in text and "(standard error " in text


@pytest.mark.parametrize(("share", "astray"), [(0.54, True), (0.74, True), (0.76, False)])
def test_verdict_of_vectors_that_route_to_others_experts(share, astray):
    """Of two experts half of all images are on the right one by chance."""
    wrong = {"ensemble": 14, "per_sample": 16, "hard": 16, "uniform": 110}
    report = make_report(0.99, wrong)
    for stats in report.coopvec["tasks"].values():
        stats["mean"] = [0.5, 0.5]
    report.coopvec["argmax_is_task"] = share
    text = report.verdict()
    assert ("routed, often to another expert than the image's own:" in text) is astray
    assert ("in effect routing" in text) is not astray


def test_verdict_compares_with_the_ensemble_and_with_averaging():
    wrong = {"ensemble": 14, "per_sample": 16, "dataset": 10, "uniform": 110, "global": 111}
    text = make_report(wrong=wrong).verdict()
    assert "Against the ensemble's 93.0 %" in text
    assert "per sample 92.0 % (1.0 points below, the same answer for 99.0 % of the images)" in text
    assert "per data set 95.0 % (2.0 points above" in text
    assert "reaches 44.5 %, like plain averaging's 45.0 %" in text
    far = make_report(wrong={**wrong, "global": 20}).verdict()
    assert "reaches 90.0 %, against plain averaging's 45.0 %" in far


def test_verdict_of_one_expert_and_of_unknown_owners():
    report = make_report()
    report.coopvec["argmax_is_task"] = None
    assert "own expert" not in report.verdict()
    for stats in report.coopvec["tasks"].values():
        stats["mean"] = [1.0]
    assert "had one expert to choose from" in report.verdict()


# -- figures -------------------------------------------------------------------------------------


def drawn(path):
    """Width, height, share of pixels that are not white, number of colours."""
    pixels = (imread(path)[..., :3] * 255).astype(np.uint8)
    ink = (pixels < 245).any(-1)
    return pixels.shape[1], pixels.shape[0], ink.mean(), len(np.unique(pixels[ink], axis=0))


def test_figures_are_drawn(tmp_path):
    paths = make_report().plot(tmp_path / "figures")
    assert [path.name for path in paths] == ["accuracy.png", "coopvecs.png", "losses.png"]
    for path in paths:
        width, height, ink, colours = drawn(path)
        assert width > 500 and height > 300
        assert 0.01 < ink < 0.95
        assert colours > 20


def test_figures_show_the_numbers():
    report = make_report()
    rows = report.rows()[::-1]
    panels = {axis.get_title(): axis for axis in figures.accuracy(report).axes}
    for column in (*TASKS, "mean"):
        dots = {
            rows[int(line.get_ydata()[0])]: line.get_xdata()[0]
            for line in panels[column].lines
            if line.get_marker() != "None"
        }
        assert dots == {row: report.accuracy[row][column] for row in rows}
    image = figures.coopvecs(report).axes[0].images[0]
    means = [report.coopvec["tasks"][task]["mean"] for task in TASKS]
    np.testing.assert_array_equal(image.get_array(), np.array(means))
    boosting = figures.losses(report.history).axes[0]
    assert [line.get_label() for line in boosting.lines] == [*TASKS, "mean"]
    steps = boosting.lines[0].get_xdata()
    assert 0 < steps[0] < steps[-1] <= 2500 * 3 * 1.001


def test_no_history_no_loss_figure_and_many_tasks_wrap(tmp_path):
    report = make_report()
    report.history = None
    report.tasks = [f"task {k}" for k in range(9)]
    for row, values in report.accuracy.items():
        report.accuracy[row] = {**dict.fromkeys(report.tasks, values["digits"]), "mean": 50.0}
    stats = report.coopvec["tasks"]["digits"]
    report.coopvec["tasks"] = dict.fromkeys(report.tasks, stats)
    paths = report.plot(tmp_path)
    assert [path.name for path in paths] == ["accuracy.png", "coopvecs.png"]


def _report(accuracy):
    stats = {"mean": [1.0], "max": 1.0, "entropy": 0.0, "argmax_is_task": None}
    tasks = ["cats", "dogs"]
    settings = {"class_names": {"cats": ["a", "b"], "dogs": list("abcde")}}
    settings["samples"] = {"cats": 100, "dogs": 400}
    return Report(tasks, accuracy, {}, {**stats, "tasks": {}}, settings, 0.0)


def test_experts_that_guess_are_told():
    # Guessing: 50 % and, of 100 images, 5 points of standard error; 20 % and 2 points.
    own = {"cats": 65.0, "dogs": 26.1}
    ensemble = {"cats": 90.0, "dogs": 90.0}
    (told,) = guesses(_report({"ensemble": ensemble, "expert": own}))
    assert told.startswith(
        "task cats: its own expert is right on 65.0 % of 100 images, and guessing among 2 classes "
        "on 50.0 %"
    )
    assert not list(guesses(_report({"ensemble": ensemble})))
    (told,) = guesses(_report({"ensemble": {"cats": 65.1, "dogs": 25.9}}))
    assert told.startswith("task dogs: experts are right on 25.9 % of 400 images")
