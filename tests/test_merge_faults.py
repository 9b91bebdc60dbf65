"""Merging that is killed, meets a full disk or hostile files: resumable or whole, never wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import neulig_fast as nf
from neulig_fast.checkpoints.manifest import MANIFEST, verify
from neulig_fast.checkpoints.merging import foresee
from neulig_fast.checkpoints.write import STAGING
from neulig_fast.demo import llamas

# What a merge asks of the system, in the order in which it does.
CALLS = ("pwrite", "write", "posix_fallocate", "fsync", "replace", "unlink", "open", "mkdir")


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    llamas.family(tmp_path, 2)
    models = [{"model": str(tmp_path / m), "parameters": {"weight": 1}} for m in ("m0", "m1")]
    return {"merge_method": "linear", "models": models}


def loadable(folder: Path) -> bool:
    """Whether loaders would take a folder for a checkpoint."""
    return any((folder / name).exists() for name in ("model.safetensors", llamas.INDEX))


@pytest.fixture
def wanted(tmp_path: Path, config: dict[str, Any]) -> dict[str, bytes]:
    nf.merge(config, tmp_path / "wanted", shard_size=8000)
    return llamas.contents(tmp_path / "wanted")


# -- killed ---------------------------------------------------------------------------------------

# Forks a child for every point at which it is to be killed: torch is imported once.
_KILLED = """
import json, os, signal, sys
from pathlib import Path
import neulig_fast as nf
from neulig_fast.demo import llamas

folder, config, points, calls = json.loads(sys.argv[1])
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
    nf.merge(config, folder, shard_size=8000, threads=1)

def forked(*args):
    child = os.fork()
    if child == 0:
        merge(*args)
        os._exit(0)
    return os.waitpid(child, 0)[1]

# What is imported when it is first used is imported once, not in every child.
nf.merge(config, folder.parent / "once", threads=1)
old = llamas.contents(folder) if folder.exists() else {}
for point in points:
    status = forked(point)
    files = llamas.contents(folder) if folder.exists() else {}
    print(json.dumps({
        "point": point,
        "killed": os.WIFSIGNALED(status),
        "loadable": any(n in files for n in ("model.safetensors", llamas.INDEX)),
        "old": files == old,
        "again": forked(),
        "names": sorted(files),
        "contents": {n: b.hex() for n, b in llamas.contents(folder).items()},
    }), flush=True)
    for path in list(folder.iterdir()):
        path.unlink()
    for name, data in old.items():
        (folder / name).write_bytes(data)
"""


def killed(folder: Path, config: dict[str, Any], points: list[int]) -> Iterator[dict[str, Any]]:
    given = json.dumps([str(folder), config, points, CALLS])
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, given], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    yield from map(json.loads, done.stdout.splitlines())


@pytest.mark.parametrize("before", ["nothing", "single", "sharded"])
def test_killed_anywhere_and_resumed_gives_the_same_bytes(
    tmp_path: Path, config: dict[str, Any], wanted: dict[str, bytes], before: str
) -> None:
    """There are about seventy calls of the system; the process dies at every fourth, others
    for what was there before."""
    folder = tmp_path / "out"
    if before != "nothing":
        other = config | {"parameters": {"normalize": False}}
        nf.merge(other, folder, shard_size="1G" if before == "single" else 6000)
    ends = 0
    points = list(range({"nothing": 0, "single": 1, "sharded": 2}[before], 110, 4))
    for found in killed(folder, config, points):
        assert found["again"] == 0
        assert found["contents"].keys() == wanted.keys(), found["point"]
        for name, data in found["contents"].items():
            assert bytes.fromhex(data) == wanted[name], (found["point"], name)
        if found["killed"] and found["loadable"] and not found["old"]:
            assert set(wanted) - {MANIFEST} <= set(found["names"]), found["point"]
        ends += not found["killed"]
    assert ends > 0, "the last points must lie behind the end"
    assert ends < len(points) / 2, "most points must lie before the end"


def test_what_was_written_is_not_written_again(tmp_path: Path, config: dict[str, Any]) -> None:
    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise Enough

    with pytest.raises(Enough):
        nf.merge(config, tmp_path / "out", threads=1, progress=stop)
    assert not loadable(tmp_path / "out")
    report = nf.merge(config, tmp_path / "out")
    assert report.tensors / 4 < report.resumed < report.tensors
    assert "from an interrupted run" in str(report)
    verify(tmp_path / "out")


def interrupted(folder: Path, config: dict[str, Any]) -> None:
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nf.merge(config, folder, threads=1, progress=stop, shard_size=8000)


def test_a_journal_is_not_believed(
    tmp_path: Path, config: dict[str, Any], wanted: dict[str, bytes]
) -> None:
    interrupted(tmp_path / "out", config)
    for shard in (tmp_path / "out" / STAGING).glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-40:] = b"\xff" * 40
        shard.write_bytes(data)
    journal = tmp_path / "out" / STAGING / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b"[" * 100_000 + b'\n{"tensor": "lm_hea')
    nf.merge(config, tmp_path / "out", shard_size=8000)
    assert llamas.contents(tmp_path / "out") == wanted


@pytest.mark.parametrize("change", ["recipe", "input", "layout"])
def test_another_merge_does_not_go_on_with_this_one(
    tmp_path: Path, config: dict[str, Any], change: str
) -> None:
    interrupted(tmp_path / "out", config)
    size = 8000
    if change == "recipe":
        config = config | {"parameters": {"normalize": False}}
    elif change == "input":
        file = next((tmp_path / "m1").glob("*.safetensors"))
        os.utime(file, ns=(1, 1))
    else:
        size = 9000
    with pytest.raises(ValueError, match="holds an interrupted merge that differs in"):
        nf.merge(config, tmp_path / "out", shard_size=size)
    nf.merge(config, tmp_path / "out", shard_size=size, resume=False)
    verify(tmp_path / "out")


# -- a full disk ----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "write", "fsync"])
def test_a_full_disk_leaves_the_old_state(
    tmp_path: Path,
    config: dict[str, Any],
    wanted: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    folder = tmp_path / "out"
    nf.merge(config | {"parameters": {"normalize": False}}, folder)
    old = llamas.contents(folder)
    whole: Callable[..., Any] = getattr(os, call)
    for after in range(8):
        left = after

        def full(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return whole(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            try:
                nf.merge(config, folder, shard_size=8000, threads=1)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                if call == "pwrite" and after > 3:  # of weights
                    assert ".merging/model-0000" in str(error.filename)
                assert llamas.contents(folder) == old
            else:
                break
    nf.merge(config, folder, shard_size=8000)
    assert llamas.contents(folder) == wanted


def test_a_file_is_no_folder_for_results(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "file").touch()
    for place in ("file", "file/below"):
        with pytest.raises(OSError, match=r"file: is a file, not a folder$"):
            nf.merge(config, tmp_path / place)
        with pytest.raises(OSError, match=r"file: is a file, not a folder$"):
            foresee(config, tmp_path / place)


def test_a_disk_that_is_too_small_is_found_before_the_work(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="the disk has 1000 bytes free"):
        nf.merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- hostile and broken files ---------------------------------------------------------------------


def test_a_folder_with_other_files_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"a file that no merge wrote \(thesis.tex\)"):
        nf.merge(config, tmp_path / "out")
    assert (tmp_path / "out/thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("several", [False, True])
def test_two_merges_into_one_folder_do_not_run_at_once(
    tmp_path: Path, config: dict[str, Any], several: bool
) -> None:
    """They would take each other's files for their own."""
    if several:
        config = config | {"neulig_fast": {"sweep": {"normalize": [False, True]}}}
    folder, met = tmp_path / "out", []

    def again(done: int, total: int) -> None:
        files = sorted(path for path in folder.rglob("*"))
        with pytest.raises(ValueError, match="out: another merge into it is running"):
            nf.merge(config, folder, resume=len(met) % 2 == 0)
        assert sorted(path for path in folder.rglob("*")) == files
        met.append(done)

    nf.merge(config, folder, threads=1, progress=again)
    assert met
    nf.merge(config, folder)  # and let go of it at the end


def test_nor_do_one_of_several_results_and_a_merge_of_it_alone(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    several = config | {"neulig_fast": {"sweep": {"normalize": [False, True]}}}
    (own, other), met = [tmp_path / f"out/normalize={word}" for word in ("true", "false")], []

    def again(merge: dict[str, Any], folder: Path) -> Callable[[int, int], None]:
        def meanwhile(done: int, total: int) -> None:
            files = sorted(path for path in tmp_path.rglob("*"))
            with pytest.raises(ValueError, match="normalize=true: another merge into it is runn"):
                nf.merge(merge, folder)
            assert sorted(path for path in tmp_path.rglob("*")) == files
            met.append(done)

        return meanwhile

    nf.merge(several, tmp_path / "out", threads=1, progress=again(config, own))
    began = len(met)
    shutil.rmtree(own)
    nf.merge(config, own, threads=1, progress=again(several, tmp_path / "out"))
    assert 0 < began < len(met)
    shutil.rmtree(own)
    nf.merge(several, tmp_path / "out")
    assert llamas.contents(own).keys() == llamas.contents(other).keys()


def test_a_model_is_not_merged_into_its_own_folder(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="which the merge reads and would replace"):
        nf.merge(config, tmp_path / "m0")


@pytest.mark.parametrize("way", ["itself", "folder", "files", "moved"])
def test_a_merge_is_not_replaced_by_what_is_made_from_it(
    tmp_path: Path, config: dict[str, Any], way: str
) -> None:
    """A crash between two renames would leave neither."""
    out = tmp_path / "out"
    nf.merge(config, out)
    before, link = llamas.contents(out), tmp_path / "link"
    if way == "folder":
        link.symlink_to(out)
    elif way == "files":
        link.mkdir()
        for path in out.iterdir():
            (link / path.name).symlink_to(path)
    elif way == "moved":
        link.mkdir()
        for path in out.glob("*.safetensors"):
            path.symlink_to(path.rename(link / path.name))
    config["models"][0]["model"] = str(out if way in ("itself", "moved") else link)
    for act in (nf.merge, foresee):
        with pytest.raises(ValueError, match="which the merge reads and would replace"):
            act(config, out)
    assert llamas.contents(out) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[]", "must be a JSON object, got list"),
        (b"{", "is no JSON"),
        (b'{"a": "\xff"}', "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
    ],
)
def test_a_broken_configuration_is_found_before_the_work(
    tmp_path: Path, config: dict[str, Any], text: bytes, said: str
) -> None:
    (tmp_path / "m0/config.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"m0/config.json: {said}"):
        nf.merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max_ram", "9" * 400),
        ("shard_size", "9" * 30),
        ("threads", "2"),
        ("threads", 1.5),
        ("threads", True),
        ("device", None),
        ("seed", 2**63),
        ("seed", "x"),
    ],
)
def test_what_no_option_can_be_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], option: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=f"{option} must be .*, got"):
        nf.merge(config, tmp_path / "out", **{option: value})
    assert not (tmp_path / "out").exists()


def test_an_input_that_shrinks_is_an_error(
    tmp_path: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sorted((tmp_path / "m1").glob("*.safetensors"))[0]
    size = file.stat().st_size

    def cut(done: int, total: int) -> None:
        os.truncate(file, size // 2)

    with pytest.raises(ValueError, match="ends within"):
        nf.merge(config, tmp_path / "out", threads=1, progress=cut)
    assert not loadable(tmp_path / "out")


def test_what_no_merge_wrote_is_no_manifest(tmp_path: Path, config: dict[str, Any]) -> None:
    out = tmp_path / "out"
    nf.merge(config, out)
    content = json.loads((out / MANIFEST).read_text())
    del content["xxh3"]
    for entry in content["tensors"].values():
        del entry["file"]
    for text in ("[]", "null", "[" * 100_000, json.dumps(content)):
        (out / MANIFEST).write_text(text)
        for act in (verify, lambda folder: nf.merge(config, folder)):
            with pytest.raises(ValueError, match=r"merge_manifest.json: no merge wrote this"):
                act(out)


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/tmp/evil.safetensors", "a/b.safetensors"]
)
def test_manifests_do_not_reach_out_of_their_folder(
    tmp_path: Path, config: dict[str, Any], name: str
) -> None:
    nf.merge(config, tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    content = json.loads(path.read_text())
    content["files"][name] = content["files"].pop("model.safetensors")
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no merge wrote this"):
        verify(tmp_path / "out")
    with pytest.raises(ValueError, match="no merge wrote this"):
        nf.merge(config, tmp_path / "out")


# -- verify ---------------------------------------------------------------------------------------


def test_verify_finds_any_changed_byte(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = tmp_path / "out"
    nf.merge(config, folder, shard_size=8000)
    assert verify(folder).tensors.keys() == llamas.load(folder).keys()
    g = torch.Generator().manual_seed(0)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        count = 200 if path.name == MANIFEST else 12
        for at in torch.randint(len(data), (count,), generator=g).tolist():
            changed = bytearray(data)
            changed[at] ^= 1 << (at % 8)
            path.write_bytes(changed)
            with pytest.raises(ValueError):
                verify(folder)
        path.write_bytes(data[:-1])
        with pytest.raises(ValueError, match=r"has \d+ bytes, not|from its own checksum"):
            verify(folder)
        path.unlink()
        with pytest.raises((ValueError, FileNotFoundError), match=r"is missing|has no merge_man"):
            verify(folder)
        path.write_bytes(data)
    verify(folder)


def test_verify_lists_all_that_is_wrong(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = tmp_path / "out"
    nf.merge(config, folder)
    (folder / "config.json").write_text("{}")
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match=r"2 problems") as caught:
        verify(folder)
    assert "README.md is missing" in str(caught.value)
    assert "config.json has 2 bytes" in str(caught.value)
    stale = "model-00001-of-00002.safetensors"
    (folder / stale).write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "notes.txt").write_text("no loader reads this")
    with pytest.raises(ValueError, match=r"3 problems") as caught:
        verify(folder)
    assert f"{stale} is not of this merge" in str(caught.value)


def test_verify_of_what_is_no_merge(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(FileNotFoundError, match="not a merge, or an unfinished one"):
        verify(tmp_path / "m0")
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such folder$"):
        verify(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json: is a file, not a folder$"):
        verify(tmp_path / "m0/config.json")


def test_verify_of_several_results_points_to_them(tmp_path: Path, config: dict[str, Any]) -> None:
    config["neulig_fast"] = {"outputs": {"one": {}, "two": {"parameters": {"weight": 2}}}}
    nf.merge(config, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="its folders one, two have: verify them one by"):
        verify(tmp_path / "out")
    verify(tmp_path / "out/two")
