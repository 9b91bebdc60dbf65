"""Reading strangers' weight files, and writing files that are old or new but never half."""

import errno
import json
import os
import pickle
import re
import sys
import textwrap
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from neulig_fast.state_files import (
    make_writable_folder,
    read_state_dict,
    write_json,
    write_safetensors,
    write_text,
)

TENSORS = {
    "visual.weight": torch.arange(6.0).view(2, 3) / 7,
    "visual.bias": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scale": torch.tensor(3.25, dtype=torch.float64),
    "steps": torch.tensor(7),
    "mask": torch.tensor([True, False, True]),
    "none": torch.zeros(0, 4, dtype=torch.float16),
}
ALL_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)


def assert_same(left, right):
    assert set(left) == set(right)
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype and torch.equal(tensor, right[key]), key


# --- reading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path, zipped):
    path = tmp_path / "weights.pt"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=zipped)
    assert list(read_state_dict(path)) == list(TENSORS)
    assert_same(read_state_dict(str(path)), TENSORS)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin"])
def test_safetensors_by_suffix_or_content(tmp_path, name):
    save_file(TENSORS, tmp_path / name)
    assert_same(read_state_dict(tmp_path / name), TENSORS)


def test_checkpoint_and_data_parallel_wrappings_come_off(tmp_path):
    path = tmp_path / "checkpoint.pt"
    wrapped = OrderedDict((f"module.{name}", tensor) for name, tensor in TENSORS.items())
    torch.save({"epoch": 3, "state_dict": wrapped, "optimizer": {"lr": 0.1}}, path)
    assert_same(read_state_dict(path), TENSORS)
    save_file(dict(wrapped), tmp_path / "m.safetensors")
    assert_same(read_state_dict(tmp_path / "m.safetensors"), TENSORS)
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, path)
    assert list(read_state_dict(path)) == ["module.a", "b"]


def test_parameters_come_out_as_plain_tensors(tmp_path):
    path = tmp_path / "net.pt"
    net = nn.Linear(2, 3)
    torch.save(dict(net.named_parameters()), path)
    tensors = read_state_dict(path)
    assert_same(tensors, {k: p.detach() for k, p in net.named_parameters()})
    assert all(type(t) is torch.Tensor and not t.requires_grad for t in tensors.values())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_files_are_memory_mapped(tmp_path, name):
    path = tmp_path / name
    save = torch.save if path.suffix == ".pt" else save_file
    save({"a": torch.arange(5.0)}, path)
    tensors = read_state_dict(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    assert tensors["a"].tolist() == [0, 1, 2, 3, 4]


class Evil:
    """A pickle of it makes a folder when it is loaded by a loader that trusts it."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


class Settings:
    pass


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "name"),
    [
        (lambda: {"a": torch.ones(1), "e": Evil()}, f"{os.mkdir.__module__}.mkdir"),
        (lambda: {"a": torch.ones(1), "args": Settings()}, f"{__name__}.Settings"),
        (lambda: nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ],
)
def test_pickles_that_need_code_are_refused_by_name(tmp_path, monkeypatch, zipped, content, name):
    path = tmp_path / "whole.pt"
    monkeypatch.chdir(tmp_path)
    torch.save(content(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError) as error:
        read_state_dict(path)
    text = str(error.value)
    assert text.startswith(f"{path}: loading this pickle needs to run {name}, which is refused")
    assert "torch.save(model.state_dict(), path)" in text
    assert not Path("evil").exists()
    if isinstance(content(), dict) and "e" in content():
        torch.load(path, weights_only=False)
        assert Path("evil").exists(), "the pickle is harmless and proves nothing"


@pytest.mark.filterwarnings("ignore")
def test_torchscript_archives_are_refused(tmp_path):
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(ValueError, match=r"script\.pt: a TorchScript archive holds code"):
        read_state_dict(path)


def test_files_that_are_not_there_or_not_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pt"):
        read_state_dict(tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="is a folder"):
        read_state_dict(tmp_path)


def damaged_files(folder: Path):
    torch.save(TENSORS, folder / "whole.pt")
    torch.save(TENSORS, folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file(TENSORS, folder / "whole.safetensors")
    zipped, old, safe = (
        (folder / name).read_bytes() for name in ("whole.pt", "old.pt", "whole.safetensors")
    )
    yield "empty.pt", b"", "the file is empty"
    yield "empty.safetensors", b"", "the file is empty"
    yield "half.pt", zipped[: len(zipped) // 2], "the file is truncated"
    yield "old-half.pt", old[: len(old) // 2], "not a readable torch file, damaged"
    yield "old-end.pt", old[:-3], "not a readable torch file, damaged"
    yield "half.safetensors", safe[:-5], "not a complete safetensors file"
    yield "header.safetensors", safe[:30], "not a complete safetensors file"
    yield "torch.safetensors", zipped, "not a complete safetensors file"
    other_key = re.sub(rb"(\d)(\d{7,})(?!.*\d{8})", rb"0\2", old, flags=re.DOTALL)
    yield "old-key.pt", other_key, "not a readable torch file, damaged"
    yield "text.pt", b"hello world\n", "not a readable torch file"
    yield "config.pt", b'{"a": 1}', "not a readable torch file"
    yield "pickle.pkl", pickle.dumps({"a": 1}, protocol=4), "not a readable torch file"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files(tmp_path):
    for name, content, message in damaged_files(tmp_path):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            read_state_dict(path)
        assert str(error.value).startswith(f"{path}: {message}"), name
        assert "weights_only" not in str(error.value), "no advice to run strangers' code"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no tensors"),
        ({"state_dict": {}}, "holds no tensors"),
        (torch.ones(2), "holds a Tensor, expected tensors by name"),
        ({"state_dict": [1]}, "holds a list, expected tensors by name"),
        (
            {"a": torch.ones(1), "epoch": 3, "opt": {"lr": 1.0}, 4: torch.ones(1)},
            r"are no tensors: 'epoch' \(int\), 'opt' \(dict\), 4 \(Tensor\)",
        ),
    ],
)
def test_files_that_hold_something_else(tmp_path, content, message):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"other\.pt: .*{message}"):
        read_state_dict(path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), kind=st.sampled_from(["zip", "old", "safetensors"]))
def test_no_damage_gets_past_as_another_error(tmp_path, data, kind):
    path = tmp_path / "fuzz.bin"
    if kind == "safetensors":
        save_file(TENSORS, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=kind == "zip")
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(content)))
    path.write_bytes(content[: cut if data.draw(st.booleans()) else len(content)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tensors = read_state_dict(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")
        else:
            assert all(isinstance(t, torch.Tensor) for t in tensors.values())


# --- writing ----------------------------------------------------------------------------------


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    entries=st.lists(
        st.tuples(st.sampled_from(ALL_DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=6
    ),
    flip=st.booleans(),
)
def test_any_tensors_round_trip_through_the_format(tmp_path, entries, flip):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, (dtype, shape) in enumerate(entries):
        tensor = (torch.randn(shape, generator=generator) * 50).abs().to(dtype)
        tensors[f"t.{i}.ü"] = tensor.mT if flip and tensor.ndim > 1 else tensor
    path = tmp_path / "round.safetensors"
    write_safetensors(path, tensors)
    assert_same(load_file(path), tensors)
    first = path.read_bytes()
    length = int.from_bytes(first[:8], "little")
    header = json.loads(first[8 : 8 + length])
    starts = {key: 8 + length + header[key]["data_offsets"][0] for key in tensors}
    assert all(start % tensors[key].element_size() == 0 for key, start in starts.items())
    write_safetensors(path, tensors)
    assert path.read_bytes() == first


def test_tensors_that_share_memory_and_need_grad(tmp_path):
    weight = nn.Parameter(torch.arange(12.0))
    tensors = {"all": weight, "again": weight, "part": weight[3:7], "every": weight[::2]}
    write_safetensors(tmp_path / "w.safetensors", tensors)
    assert_same(load_file(tmp_path / "w.safetensors"), {k: t.detach() for k, t in tensors.items()})


def test_metadata(tmp_path):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, TENSORS, {"format": "pt", "note": "ä\n"})
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ä\n"}
    write_safetensors(path, {})
    assert load_file(path) == {}


def test_what_the_format_cannot_hold_is_listed_before_writing(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"old")
    tensors = {
        "a": 3,
        "b": torch.ones(1, dtype=torch.complex64),
        "c": torch.ones(2, 2).to_sparse(),
        "d": torch.ones(1, device="meta"),
        "__metadata__": torch.ones(1),
    }
    with pytest.raises(ValueError) as error:
        write_safetensors(path, tensors, {"n": 1})
    for part in (
        "a is a int, not a tensor",
        "b has dtype torch.complex64",
        "c is not dense (torch.sparse_coo on cpu)",
        "d is not dense (torch.strided on meta)",
        "'__metadata__' is not a possible name",
        "metadata 'n' is not text: 1",
    ):
        assert part in str(error.value)
    assert path.read_bytes() == b"old"


def test_json(tmp_path):
    path = tmp_path / "report.json"
    write_json(path, {"accuracy": {"über": 1.5}, "tasks": ["a"], "none": None})
    assert json.loads(path.read_text(encoding="utf-8"))["accuracy"] == {"über": 1.5}
    assert path.read_text(encoding="utf-8").endswith("}\n")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"loss": torch.ones(1)})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


WRITERS = [
    lambda path: write_json(path, {"new": True}),
    lambda path: write_safetensors(path, {"new": torch.ones(1000)}),
]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failing_disk_leaves_the_old_file(tmp_path, monkeypatch, write, step, existing):
    path = tmp_path / "file"
    if existing:
        path.write_bytes(b"old")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left on device") as error:
        write(path)
    monkeypatch.undo()
    assert error.value.errno == errno.ENOSPC
    assert f"could not write {path}: " in str(error.value)
    kept = "the old file is unchanged" if existing else "nothing was written"
    assert kept in str(error.value)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([b"old"] if existing else [])


FULL_DISK = """
    import resource, sys, torch
    from neulig_fast.state_files import write_json, write_safetensors

    path = sys.argv[1]
    write_safetensors(path, {"w": torch.zeros(1000)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    for write, new in (
        (write_safetensors, {"w": torch.ones(1 << 20), "v": torch.ones(3)}),
        (write_json, ["x" * (2 << 20)]),
    ):
        try:
            write(path, new)
        except OSError as error:
            print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs file size limits")
def test_a_write_that_really_breaks_off(python, tmp_path):
    path = tmp_path / "weights.safetensors"
    done = python(textwrap.dedent(FULL_DISK), path)
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines)) == (0, 2), done.stderr
    for line in lines:
        assert f"could not write {path}: File too large; the old file is unchanged" in line
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert torch.equal(load_file(path)["w"], torch.zeros(1000))


def test_an_interrupt_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "file", {})
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"could not write .*nothing was written"):
        write_json(tmp_path / "no" / "file.json", {})


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions and links")
def test_a_folder_is_made_and_tried(tmp_path):
    make_writable_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to .*file/folder"):
        make_writable_folder(tmp_path / "file" / "folder")


def test_a_folder_that_takes_no_files_is_named(tmp_path, monkeypatch):
    def refused(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(PermissionError, match=f"cannot write to {tmp_path}: Permission denied"):
        make_writable_folder(tmp_path)


def test_text_is_written_in_utf_8(tmp_path):
    write_text(tmp_path / "report.txt", "Σ über\n")
    assert (tmp_path / "report.txt").read_bytes() == "Σ über\n".encode()


def test_permissions_and_links_are_those_of_a_plain_write(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    link.symlink_to(real)
    mask = os.umask(0o027)
    try:
        write_json(link, {"a": 1})
    finally:
        os.umask(mask)
    assert link.is_symlink() and json.loads(real.read_text()) == {"a": 1}
    assert real.stat().st_mode & 0o777 == 0o640
