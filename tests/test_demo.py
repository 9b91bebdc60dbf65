"""The demo's pipeline at toy size: the same stages and the same files, in seconds."""

import json

import open_clip
import pytest
import torch
from rich.console import Console

import neulig_fast
from neulig_fast.demo import clip, tasks
from neulig_fast.demo.pipeline import run
from neulig_fast.demo.settings import DemoSettings

ROWS = {
    "pretrained", "expert", "uniform", "task_arithmetic", "hard", "ensemble", "per_sample",
    "batch_mean", "dataset", "first_sample", "global",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    console = Console(record=True, width=100)
    reports = run(folder, DemoSettings.toy(), console)
    return folder, reports, console.export_text()


def test_the_report_has_every_row_for_every_task(finished):
    folder, _, _ = finished
    report = json.loads((folder / "report.json").read_text())
    assert set(report["tasks"]) == set(tasks.TASK_NAMES)
    assert set(report["accuracy"]) == ROWS
    for row in report["accuracy"].values():
        assert set(row) == {*tasks.TASK_NAMES, "mean"}
        of_tasks = [row[task] for task in tasks.TASK_NAMES]
        assert all(0 <= value <= 100 for value in of_tasks)
        assert row["mean"] == pytest.approx(sum(of_tasks) / len(of_tasks))
    assert {"max", "entropy", "argmax_is_task"} <= set(report["coopvec"])
    assert report["seconds"] > 0 and report["settings"]["alignment"] == "variance"


def test_both_settings_are_shown_and_the_published_one_is_the_papers(finished):
    folder, reports, text = finished
    assert list(reports) == ["variance", "offset_sum"]
    published = json.loads((folder / "report_published.json").read_text())
    assert (published["settings"]["alignment"], published["settings"]["scaling"]) == (
        "offset_sum",
        100.0,
    )
    assert "report_published.json of the published one, the paper's alignment" in text
    assert "published" in text and "CoopVecs" in text and "Hard routing" in text


def test_merged_models_load_as_printed_and_give_the_engines_logits(finished):
    folder, _, text = finished
    config = folder / f"{clip.MODEL_NAME}.json"
    assert f"open_clip.add_model_config({str(config)!r})" in text
    open_clip.add_model_config(config)
    engine = neulig_fast.NeuLig.load(folder / "engine", template=clip_visual())
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for task in tasks.TASK_NAMES:
        file = str(folder / f"merged_{task}.safetensors")
        model = open_clip.create_model(clip.MODEL_NAME, pretrained=file).eval()
        with torch.no_grad():
            expected = engine.merged_forward(images, task, mode="dataset")
            torch.testing.assert_close(engine.heads[task](model.encode_image(images)), expected)


def clip_visual():
    return clip.build_model(DemoSettings.toy()).visual


def test_figures_are_drawn(finished):
    folder, _, _ = finished
    for name in ("accuracy", "coopvecs", "losses", "tasks"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
