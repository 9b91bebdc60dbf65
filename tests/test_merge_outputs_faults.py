"""Several results that are killed on the way: each whole or not there, and what is whole stays."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import neulig_fast as nf
from neulig_fast.checkpoints.folders import Folders
from neulig_fast.checkpoints.manifest import MANIFEST, verify
from neulig_fast.checkpoints.write import STAGING, Staging
from neulig_fast.demo import llamas

# What a merge asks of the system, in the order in which it does.
CALLS = ("pwrite", "write", "posix_fallocate", "fsync", "replace", "unlink", "open", "mkdir")
NAMES = ("lambda=1", "lambda=2", "lambda=3")
SIZE = 1500  # of shards: three in a result


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    llamas.family(tmp_path, 2, layers=1, width=8, words=10)
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / m), "parameters": {"weight": 1}} for m in ("m0", "m1")],
        "neulig_fast": {"sweep": {"lambda": [1, 2, 3]}},
    }


def contents(folder: Path) -> dict[str, dict[str, bytes]]:
    return {name: llamas.contents(folder / name) for name in NAMES if (folder / name).exists()}


@pytest.fixture
def wanted(tmp_path: Path, config: dict[str, Any]) -> dict[str, dict[str, bytes]]:
    nf.merge(config, tmp_path / "wanted", shard_size=SIZE)
    return contents(tmp_path / "wanted")


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again or replaced."""
    found = {path.name: path.stat() for path in folder.iterdir() if path.is_file()}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


# -- killed ---------------------------------------------------------------------------------------

# Forks a child for every point at which it is to be killed: torch is imported once.
_KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
import neulig_fast as nf
from neulig_fast.demo import llamas

folder, config, points, calls, size, names = json.loads(sys.argv[1])
folder = Path(folder)

def merge(at=None):
    def counted(call):
        def run(*args, **kwargs):
            nonlocal at
            at -= 1
            if at < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return run
    if at is not None:
        for name in calls:
            setattr(os, name, counted(getattr(os, name)))
    nf.merge(config, folder, shard_size=size, threads=1)

def forked(*args):
    child = os.fork()
    if child == 0:
        merge(*args)
        os._exit(0)
    return os.waitpid(child, 0)[1]

def look():
    found = {}
    for name in names:
        place = folder / name
        paths = [path for path in place.iterdir() if path.is_file()] if place.exists() else []
        found[name] = {p.name: [p.read_bytes().hex(), p.stat().st_ino] for p in paths}
    return found

# What is imported when it is first used is imported once, not in every child.
nf.merge(config, folder.parent / "once", threads=1)
old = folder.parent / "old"
for point in points:
    shutil.rmtree(folder, ignore_errors=True)
    if old.exists():
        shutil.copytree(old, folder)
    status = forked(point)
    print(json.dumps({
        "point": point,
        "killed": os.WIFSIGNALED(status),
        "between": look(),
        "again": forked(),
        "after": look(),
        "left": sorted(path.name for path in folder.iterdir()),
    }), flush=True)
"""


def killed(folder: Path, config: Mapping[str, Any], points: list[int]) -> Iterator[dict[str, Any]]:
    given = json.dumps([str(folder), config, points, CALLS, SIZE, NAMES])
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, given], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    yield from map(json.loads, done.stdout.splitlines())


def read(state: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: bytes.fromhex(data) for name, (data, _) in state.items()}


@pytest.mark.parametrize("before", ["nothing", "another sweep"])
def test_killed_anywhere_and_resumed_gives_the_same_bytes(
    tmp_path: Path,
    config: dict[str, Any],
    wanted: dict[str, dict[str, bytes]],
    before: str,
) -> None:
    old: dict[str, dict[str, bytes]] = {name: {} for name in NAMES}
    if before != "nothing":
        other = config | {"parameters": {"normalize": True}}
        nf.merge(other, tmp_path / "old", shard_size=900)
        old = contents(tmp_path / "old")
    ends = kept = 0
    # There are about two hundred calls of the system; the process dies at every eleventh.
    points = list(range(0 if before == "nothing" else 5, 300, 11))
    for found in killed(tmp_path / "out", config, points):
        assert found["again"] == 0
        assert found["left"] == sorted(NAMES), found["point"]
        ends += not found["killed"]
        for name in NAMES:
            between, after = found["between"][name], found["after"][name]
            assert read(after) == wanted[name], (found["point"], name)
            loadable = any(file in between for file in ("model.safetensors", llamas.INDEX))
            if loadable and read(between) != old[name]:
                assert set(wanted[name]) - {MANIFEST} <= set(between), (found["point"], name)
            if found["killed"] and read(between) == wanted[name]:
                assert between == after, f"{name} was written again after {found['point']}"
                kept += 1
    assert ends > 0, "the last points must lie behind the end"
    assert ends < len(points) / 2, "most points must lie before the end"
    assert kept > 3, "some points must lie between the results' ends"


# -- interrupted ----------------------------------------------------------------------------------


def interrupted(folder: Path, config: Mapping[str, Any]) -> None:
    """Half of the bytes are written."""

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nf.merge(config, folder, threads=1, progress=stop, shard_size=SIZE)


def ended_after_the_first(
    folder: Path, config: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All is merged, one result is in its place."""
    whole = Staging.seal

    def seal(self: Staging, *args: Any) -> None:
        if self.folder.name != NAMES[0]:
            raise KeyboardInterrupt
        whole(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "seal", seal)
        with pytest.raises(KeyboardInterrupt):
            nf.merge(config, folder, shard_size=SIZE)


def test_what_was_written_is_not_written_again(
    tmp_path: Path, config: dict[str, Any], wanted: dict[str, dict[str, bytes]]
) -> None:
    out = tmp_path / "out"
    interrupted(out, config)
    assert contents(out) == {name: {} for name in NAMES}
    report = nf.merge(config, out, shard_size=SIZE)
    for name in NAMES:
        one = report.outputs[name]
        assert one.tensors / 4 < one.resumed < one.tensors
        assert f"{name}: {one.tensors} tensors, {one.resumed} of them from an inter" in str(report)
    assert contents(out) == wanted


def test_a_journal_is_believed_for_its_own_result_alone(
    tmp_path: Path,
    config: dict[str, Any],
    wanted: dict[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    interrupted(out, config)
    for shard in (out / NAMES[1] / STAGING).glob("*.safetensors"):
        shard.write_bytes(b"\xff" * shard.stat().st_size)
    written = []
    record = Staging.record

    def spy(self: Staging, name: str, checksum: str) -> None:
        written.append(self.folder.name)
        record(self, name, checksum)

    monkeypatch.setattr(Staging, "record", spy)
    report = nf.merge(config, out, shard_size=SIZE)
    resumed = [report.outputs[name].resumed for name in NAMES]
    assert resumed[0] == resumed[2] > resumed[1] == 0
    again = [written.count(name) for name in NAMES]
    assert [sum(pair) for pair in zip(again, resumed, strict=True)] == [12, 12, 12]
    assert contents(out) == wanted


def test_a_result_that_is_whole_stays(
    tmp_path: Path,
    config: dict[str, Any],
    wanted: dict[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    ended_after_the_first(out, config, monkeypatch)
    verify(out / NAMES[0])
    before = files(out / NAMES[0])
    report = nf.merge(config, out, shard_size=SIZE)
    assert (report.bytes_in, report.bytes_out) == (0, 0)
    assert f"{NAMES[0]}: 12 tensors, all 12 of them from an interrupted run" in str(report)
    assert files(out / NAMES[0]) == before
    assert contents(out) == wanted
    assert not (out / STAGING).exists()
    # The run has ended; another one is a merge of its own, as without outputs.
    assert nf.merge(config, out, shard_size=SIZE).resumed == 0
    assert files(out / NAMES[0]) != before


def test_a_result_that_is_whole_but_not_in_its_place_is_moved_there(
    tmp_path: Path,
    config: dict[str, Any],
    wanted: dict[str, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    note = Folders._write_note

    def stop(self: Folders, names: Any) -> None:
        if names:
            raise KeyboardInterrupt
        note(self, names)

    with monkeypatch.context() as patch:
        patch.setattr(Folders, "_write_note", stop)
        with pytest.raises(KeyboardInterrupt):
            nf.merge(config, out, shard_size=SIZE)
    assert contents(out) == {name: {} for name in NAMES}
    before = files(out / NAMES[0] / STAGING)
    assert MANIFEST in before
    nf.merge(config, out, shard_size=SIZE)
    assert files(out / NAMES[0]).items() <= before.items()
    assert contents(out) == wanted


@pytest.mark.parametrize("change", ["input", "layout", "resume off", "a file is gone"])
def test_a_result_of_something_else_does_not_stay(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    out = tmp_path / "out"
    ended_after_the_first(out, config, monkeypatch)
    before = files(out / NAMES[0])
    size = SIZE
    if change == "input":
        os.utime(next((tmp_path / "m1").glob("*.safetensors")), ns=(1, 1))
    elif change == "layout":
        size = 1200
    elif change == "a file is gone":
        (out / NAMES[0] / "config.json").unlink()
    if change in ("input", "layout"):
        with pytest.raises(ValueError, match="2 problems") as caught:
            nf.merge(config, out, shard_size=size)
        assert "lambda=2: holds an interrupted merge that differs in" in str(caught.value)
    for name in NAMES[1:]:
        shutil.rmtree(out / name)
    report = nf.merge(config, out, shard_size=size, resume=change != "resume off")
    assert report.resumed == 0
    assert not set(files(out / NAMES[0]).values()) & set(before.values())


def test_a_longer_sweep_goes_on_with_an_interrupted_one(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    ended_after_the_first(out, config, monkeypatch)
    longer = config | {"neulig_fast": {"sweep": {"lambda": [1, 2, 3, 4]}}}
    report = nf.merge(longer, out, shard_size=SIZE)
    assert [one.resumed for one in report.outputs.values()] == [12, 12, 12, 0]


# -- what is not mixed ----------------------------------------------------------------------------


def test_results_that_are_not_asked_for_are_left_alone(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    nf.merge(config, out, shard_size=SIZE)
    before = files(out / NAMES[2])
    (out / "notes.txt").write_text("of the user")
    shorter = config | {"neulig_fast": {"sweep": {"lambda": [1, 5]}}}
    report = nf.merge(shorter, out, shard_size=SIZE)
    (warning,) = report.warnings
    assert "does not ask for lambda=2, lambda=3" in warning
    assert f"warning: {warning}" in str(report)
    assert files(out / NAMES[2]) == before
    verify(out / "lambda=5")
    assert (out / "notes.txt").read_text() == "of the user"


def test_all_folders_with_other_files_are_named_and_nothing_is_begun(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    for name in NAMES[1:]:
        (out / name).mkdir(parents=True)
        (out / name / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="2 problems") as caught:
        nf.merge(config, out)
    for name in NAMES[1:]:
        assert f"{name}: holds a file that no merge wrote (thesis.tex)" in str(caught.value)
    assert sorted(path.name for path in out.iterdir()) == list(NAMES[1:])
    assert [path.name for path in (out / NAMES[1]).iterdir()] == ["thesis.tex"]


def test_one_result_and_several_are_not_mixed(tmp_path: Path, config: dict[str, Any]) -> None:
    single = {key: value for key, value in config.items() if key != "neulig_fast"}
    nf.merge(single, tmp_path / "one")
    before = files(tmp_path / "one")
    with pytest.raises(ValueError, match="is a checkpoint itself"):
        nf.merge(config, tmp_path / "one")
    with pytest.raises(ValueError, match="is a checkpoint itself"):
        nf.merge(config, tmp_path / "m0")
    assert files(tmp_path / "one") == before
    interrupted(tmp_path / "two", single)
    with pytest.raises(ValueError, match="an interrupted merge of a single result"):
        nf.merge(config, tmp_path / "two")
    nf.merge(config, tmp_path / "two", resume=False)
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == list(NAMES)
    with pytest.raises(ValueError, match="3 files that no merge wrote"):
        nf.merge(single, tmp_path / "two")


def test_a_note_that_no_merge_wrote(tmp_path: Path, config: dict[str, Any]) -> None:
    note = tmp_path / "out" / STAGING / "complete.json"
    note.parent.mkdir(parents=True)
    for text in ("[]", "{", '"\\ud800', "[" * 100_000):
        note.write_text(text)
        with pytest.raises(ValueError, match=r"complete\.json: no merge wrote this"):
            nf.merge(config, tmp_path / "out")


# -- limits ---------------------------------------------------------------------------------------


def test_the_disk_must_hold_all_results(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    nf.merge(config, tmp_path / "out")
    size = (tmp_path / "out" / NAMES[0] / "model.safetensors").stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * size - 1))
    with pytest.raises(OSError, match="3 results have"):
        nf.merge(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * size))
    nf.merge(config, tmp_path / "other")


def test_a_disk_that_is_full_of_whole_results_has_room_for_the_rest(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    ended_after_the_first(out, config, monkeypatch)
    staged = [path.stat() for path in out.glob(f"*/{STAGING}/*.safetensors")]
    free = sum(stat.st_size - 512 * stat.st_blocks for stat in staged)  # below 0 for small files
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    nf.merge(config, out, shard_size=SIZE)


def test_open_files_are_counted_before_the_work(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (205, 4096))
    with pytest.raises(ValueError, match="3 results have 9 files, this process may open 205"):
        nf.merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
