"""A merge by several processes: the same bytes as by one, whoever was interrupted before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import neulig_fast as nf
from neulig_fast.checkpoints import merging, ranks
from neulig_fast.checkpoints.manifest import verify
from neulig_fast.checkpoints.prepared import prepare
from neulig_fast.checkpoints.ranks import Ranks
from neulig_fast.checkpoints.write import Staging
from neulig_fast.demo import llamas

ROOT = Path(__file__).resolve().parents[1]


def recipe(folder: Path, *names: str) -> Path:
    content = {
        "merge_method": "dare_ties",
        "base_model": str(folder / "base"),
        "models": [
            {"model": str(folder / name), "parameters": {"weight": 0.5, "density": 0.5}}
            for name in names
        ],
        "dtype": "bfloat16",
    }
    path = folder / "recipe.yml"
    path.write_text(json.dumps(content))
    return path


def by_processes(count: int, *words: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
    command += [f"--nproc-per-node={count}", "-m", "neulig_fast", "merge", *map(str, words)]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    }
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd="/")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of a base and two models beside it."""
    llamas.family(tmp_path, 2)
    return recipe(tmp_path, "m0", "m1")


def of_the_model(config: Path) -> None:
    """TIES, with thresholds that processes find together."""
    content = json.loads(config.read_text())
    ours = {"merge_method": "ties", "neulig_fast": {"scope": "model"}}
    config.write_text(json.dumps(content | ours | {"parameters": {"rescale": True}}))


@pytest.mark.parametrize(("count", "scope"), [(2, "model"), (3, "tensor")])
def test_processes_give_the_bytes_of_one(
    config: Path, tmp_path: Path, count: int, scope: str
) -> None:
    if scope == "model":
        of_the_model(config)
    nf.merge(config, tmp_path / "one", shard_size=20_000)
    done = by_processes(count, config, tmp_path / "many", "--shard-size", 20_000, "--quiet")
    assert done.returncode == 0, done.stderr
    verify(tmp_path / "many")
    assert bytes_of(tmp_path / "many") == bytes_of(tmp_path / "one")
    assert done.stdout.count("many") == 1  # one process speaks


def interrupted(config: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """A merge that ended after some tensors; how many."""
    record = Staging.record

    def failing(self: Staging, name: str, checksum: str) -> None:
        if len(self.sums) == 5:
            raise OSError("enough")
        record(self, name, checksum)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="enough"):
        patch.setattr(Staging, "record", failing)
        nf.merge(config, out, threads=1)
    return 5


def test_a_merge_of_one_is_gone_on_with_by_several(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nf.merge(config, tmp_path / "one")
    done = interrupted(config, tmp_path / "many", monkeypatch)
    process = by_processes(2, config, tmp_path / "many", "--quiet")
    assert f"{done} of them from an interrupted run" in process.stdout, process.stderr
    assert bytes_of(tmp_path / "many") == bytes_of(tmp_path / "one")


def test_what_several_have_written_is_gone_on_with_by_one(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = interrupted(config, tmp_path / "out", monkeypatch)
    journal = tmp_path / "out/.merging/journal.jsonl"
    first, *lines = journal.read_text().splitlines(keepends=True)
    journal.write_text(first + lines[0])
    journal.with_name("journal-1.jsonl").write_text("".join(lines[1:3]))
    journal.with_name("journal-2.jsonl").write_text("".join(lines[3:]))
    assert nf.merge(config, tmp_path / "out").resumed == done
    verify(tmp_path / "out")


def test_what_is_wrong_is_said_once_and_nothing_is_left(tmp_path: Path) -> None:
    llamas.family(tmp_path, 1)
    done = by_processes(2, recipe(tmp_path, "m0", "m7"), tmp_path / "many", "--quiet")
    assert done.returncode != 0
    assert "m7: no such folder" in done.stderr
    assert not (tmp_path / "many").exists()


def test_processes_that_were_asked_for_different_things_refuse(tmp_path: Path) -> None:
    llamas.family(tmp_path, 2)
    plans = [
        prepare(recipe(tmp_path, *models), seed=seed)
        for models, seed in ((("m0", "m1"), 0), (("m0", "m1"), 1), (("m1", "m0"), 0))
    ]

    for other in plans:
        told = [(one.name, one.record(), one.layout()) for one in other]
        ranks = SimpleNamespace(all=lambda work, told=told: [work(), told])
        if other is plans[0]:
            merging._agree(plans[0], ranks)  # type: ignore[arg-type]
        else:
            with pytest.raises(ValueError, match="processes 1 have another recipe"):
                merging._agree(plans[0], ranks)  # type: ignore[arg-type]


def test_a_failure_to_sync_is_not_forgotten(config: Path, tmp_path: Path, monkeypatch: Any) -> None:

    def failing(handle: int, fsync: Any = os.fsync) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith(".safetensors"):
            raise OSError(5, "the disk does not answer")
        fsync(handle)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="does not answer"):
        patch.setattr(os, "fsync", failing)
        nf.merge(config, tmp_path / "out")
    assert nf.merge(config, tmp_path / "out").resumed == 0
    verify(tmp_path / "out")


def test_a_torn_line_of_a_journal_hides_no_other(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = interrupted(config, tmp_path / "out", monkeypatch)
    journal = tmp_path / "out/.merging/journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:2], '{"tensor": "half\n', *lines[2:]]))
    assert nf.merge(config, tmp_path / "out").resumed == done


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_parts_are_all_tensors_in_order_and_evenly(sizes: list[int], count: int) -> None:
    tensors = [(SimpleNamespace(bytes=n, bytes_out=0),) for n in sizes]
    parts = [Ranks(rank, count).part(tensors) for rank in range(count)]  # type: ignore[arg-type]
    assert [tensor for part in parts for tensor in part] == tensors
    for part in parts:
        most = sum(sizes) / count + max(sizes, default=0)
        assert sum(job[0].bytes for job in part) <= most


def test_a_half_set_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with ranks.torchrun() as alone:
        assert alone == Ranks(0, 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match="RANK, MASTER_ADDR, MASTER_PORT not set"),
        ranks.torchrun(),
    ):
        pass
