"""The README says what is true: its example runs as printed, its tables match the registry."""

import ast
import json
import re
from pathlib import Path

import pytest

from neulig_fast._registry import BACKENDS, OPS
from neulig_fast.benchmarks import tables

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs_as_printed(python):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    result = python(example)
    assert result.returncode == 0, result.stderr
    accuracy = ast.literal_eval(result.stdout)
    assert set(accuracy) == {"cats", "dogs", "birds", "mean"}
    assert all(0 <= percent <= 100 for percent in accuracy.values())


def test_the_table_of_operators_is_the_registry():
    rows = re.findall(r"^\| \[`(\w+)`\]\(([^)]*)\) \|(.*)\|$", README, flags=re.M)
    assert {name for name, _, _ in rows} == set(OPS)
    header = re.search(r"^\| operator \|(.*)\|$", README, flags=re.M)[1]
    columns = [cell.strip().strip("`") for cell in header.split("|")]
    assert columns[:4] == list(BACKENDS)
    for name, page, cells in rows:
        assert (ROOT / page).is_file()
        ticks = {b for b, cell in zip(columns, cells.split("|"), strict=True) if "✓" in cell}
        assert ticks == set(OPS[name].impls), name


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"\b[A-Z]+_TEXT\b|TODO|TBD", README)
    assert re.search(r"!\[[^]]+\]\(docs/figures/", README)


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_every_speed_in_the_tables_is_a_committed_row(page):
    text = page.read_text()
    assert "<!-- rows: " in text
    assert text.count("<!-- rows: ") == text.count("<!-- end of rows -->")
    assert text == tables.rendered(text), "run `make tables`"


def test_every_device_whose_limits_were_measured_has_a_roofline():
    for folder in tables.devices():
        if any(row["op"] == "machine" for row in tables.rows_of(folder)):
            assert tables.figure_of(folder).is_file(), "run `make tables`"


def test_the_demos_figures_are_those_of_the_committed_run():
    report = json.loads((ROOT / "benchmarks/results/amd-epyc-2-cores/demo.json").read_text())
    mean = {row: f"{values['mean']:.1f}" for row, values in report["accuracy"].items()}
    for row in (
        "| pre-trained model, each task's own expert | {pretrained}, {expert} |",
        "| uniform average of the experts, task arithmetic | {uniform}, {task_arithmetic} |",
        "| **ensemble** of the experts, weighted per image | {ensemble} |",
        "(`dataset`) | {per_sample} / {dataset} |",
        "points to | {hard} |",
        "(`global`) | {global} |",
    ):
        assert row.format(**mean) in README


def test_every_linked_file_exists():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
