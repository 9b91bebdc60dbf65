"""Inputs are compared with the checksums that somebody noted, where that is asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import neulig_fast as nf
from neulig_fast.checkpoints import merging
from neulig_fast.checkpoints.manifest import verify
from neulig_fast.cli import app
from neulig_fast.demo import llamas

FILE = "model-00001-of-00001.safetensors"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    llamas.family(tmp_path, 1)
    return tmp_path


def config(*folders: Path) -> dict[str, Any]:
    models = [{"model": str(folder), "parameters": {"weight": 1.0}} for folder in folders]
    return {"merge_method": "linear", "models": models}


def flip(path: Path) -> None:
    """The last byte: of weights, which nothing else shows."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def as_merge(models: Path) -> Path:
    nf.merge(config(models / "m0"), models / "input")
    return models / "input/model.safetensors"


def as_cached(models: Path) -> Path:
    """As Hugging Face's cache has a model: links to files that are named by their SHA-256."""
    blobs, snapshot = models / "hub/blobs", models / "hub/snapshots/0"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in (models / "m0").iterdir():
        name = hashlib.sha256(file.read_bytes()).hexdigest()
        name = name if file.name == FILE else name[:40]  # small files have git's
        (blobs / name).write_bytes(file.read_bytes())
        os.symlink(f"../../blobs/{name}", snapshot / file.name)
    (models / "input").symlink_to(snapshot)
    return (snapshot / FILE).resolve()


def as_downloaded(models: Path) -> Path:
    """As `--local-dir` leaves a model."""
    folder = models / "m0"
    folder.rename(models / "input")
    file = models / "input" / FILE
    notes = models / "input/.cache/huggingface/download"
    notes.mkdir(parents=True)
    text = f"{'0' * 40}\n{hashlib.sha256(file.read_bytes()).hexdigest()}\n1.5\n"
    (notes / f"{FILE}.metadata").write_text(text)
    return file


@pytest.mark.parametrize("made", [as_merge, as_cached, as_downloaded])
def test_a_flipped_bit_of_an_input_is_found(models: Path, made: Callable[[Path], Path]) -> None:
    file = made(models)
    read: list[tuple[int, int]] = []
    merge = config(models / "input")
    report = nf.merge(
        merge, models / "out", check_inputs=True, progress=lambda *sizes: read.append(sizes)
    )
    assert report.warnings == ()
    checked = [done for done, total in read if done == total]
    assert checked[0] >= file.stat().st_size
    before = llamas.contents(models / "out")
    flip(file)
    with pytest.raises(ValueError, match="differs") as caught:
        nf.merge(merge, models / "out", check_inputs=True)
    assert str(models / "input") in str(caught.value)
    assert llamas.contents(models / "out") == before
    nf.merge(merge, models / "out")  # nobody asked
    assert llamas.contents(models / "out") != before


def test_files_without_a_checksum_are_told(models: Path) -> None:
    as_cached(models)
    note = models / "base/.cache/huggingface/download"
    note.mkdir(parents=True)
    (note / "model-00001-of-00002.safetensors.metadata").write_text("0\n")  # of no use
    report = nf.merge(
        config(models / "input", models / "base"), models / "out", check_inputs=True, threads=1
    )
    (text,) = report.warnings
    (note / "model-00001-of-00002.safetensors.metadata").write_bytes(b"\xff\n\xff\n")
    assert merging.foresee(
        config(models / "input", models / "base"), models / "x", check_inputs=True
    ).warnings == (text,)
    assert text.startswith("inputs without checksums were not checked: ")
    assert text.count("base/model-0000") == 2 and "input" not in text.partition(": ")[2]


def test_a_file_beside_an_earlier_merge_is_not_taken_for_one_of_it(models: Path) -> None:
    merged = as_merge(models)
    other = merged.with_name("weights.ckpt")
    torch.save(llamas.load(models / "base"), other)
    report = nf.merge(config(merged.parent, other), models / "out", check_inputs=True)
    assert report.warnings == (f"inputs without checksums were not checked: {other}",)


def test_on_the_command_line(models: Path) -> None:
    file = as_merge(models)
    recipe = models / "recipe.yml"
    recipe.write_text(f"merge_method: linear\nmodels: [{{model: {models / 'input'}}}]\n")
    recipe.write_text(recipe.read_text() + "parameters: {weight: 1}\n")
    command = ["merge", str(recipe), str(models / "out"), "--check-inputs", "--quiet"]
    assert CliRunner().invoke(app, command).exit_code == 0
    flip(file)
    for more in ([], ["--dry-run"]):
        done = CliRunner().invoke(app, command + more)
        assert done.exit_code == 2
        assert "differs, says merge_manifest.json" in done.output


def test_verifying_tells_how_far_it_is(models: Path) -> None:
    folder = as_merge(models).parent
    read: list[tuple[int, int]] = []
    verify(folder, lambda *sizes: read.append(sizes))
    assert (
        read[-1]
        == (sum(f.stat().st_size for f in folder.iterdir() if "manifest" not in f.name),) * 2
    )
