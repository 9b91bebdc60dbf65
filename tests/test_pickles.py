"""Checkpoints of torch.save: the same tensors as PyTorch loads, and none of their code run."""

from __future__ import annotations

import json
import os
import shlex
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neulig_fast as nf
from neulig_fast.checkpoints import dtypes
from neulig_fast.checkpoints.checkpoint import open_checkpoint
from neulig_fast.checkpoints.read import Reader
from neulig_fast.demo import llamas


def read(path: Path) -> dict[str, Tensor]:
    """All tensors, as a merge reads them."""
    found = {}
    with Reader() as reader:
        for name, entry in open_checkpoint(path).entries.items():
            found[name] = torch.empty(entry.elements, dtype=dtypes.as_torch(entry.dtype))
            reader.read(entry, 0, found[name])
            found[name] = found[name].view(entry.shape)
    return found


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        open_checkpoint(path)
    assert path.name in str(caught.value)
    return str(caught.value)


def pickled(folder: Path, shards: int = 1) -> None:
    """Turn a folder's safetensors into what older versions of transformers wrote."""
    state = llamas.load(folder)
    for file in [*folder.glob("*.safetensors"), folder / llamas.INDEX]:
        file.unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = list(state)
    weight_map = {n: f"pytorch_model-{i % shards}.bin" for i, n in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({n: state[n] for n in names if weight_map[n] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


# -- what they hold -------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_tensors_are_those_that_pytorch_loads(tmp_path: Path, wrapper: str | None) -> None:
    whole = torch.randn(6, 5)
    state: Any = OrderedDict(
        plain=torch.randn(3, 4).bfloat16(),
        rows=whole[2:4],
        same=whole,
        scalar=torch.tensor(2.5, dtype=torch.float64),
        steps=torch.arange(7),
        flags=torch.tensor([True, False]),
        half=torch.randn(3).half(),
        eighth=torch.randn(3).to(torch.float8_e4m3fn),
        empty=torch.empty(0, 5),
        parameter=nn.Parameter(torch.randn(2)),
    )
    content = state if wrapper is None else {wrapper: state, "epoch": 3}
    torch.save(content, tmp_path / "any.pt")
    got = read(tmp_path / "any.pt")
    assert got.keys() == state.keys()
    for name, tensor in state.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape
        assert torch.equal(got[name].float(), tensor.detach().float()), name


def test_pickles_merge_as_safetensors_do(tmp_path: Path) -> None:
    llamas.family(tmp_path, 3)
    names = ("m0", "m1", "m2")
    models = [{"model": str(tmp_path / n), "parameters": {"weight": 0.3}} for n in names]
    config = {"merge_method": "ties", "models": models, "base_model": str(tmp_path / "base")}
    nf.merge(config, tmp_path / "wanted")
    pickled(tmp_path / "base")
    pickled(tmp_path / "m0", shards=3)
    state = llamas.load(tmp_path / "m1")
    torch.save({"state_dict": state}, tmp_path / "m1.pth")
    models[1]["model"] += ".pth"
    nf.merge(config, tmp_path / "out", threads=2)
    got, wanted = llamas.load(tmp_path / "out"), llamas.load(tmp_path / "wanted")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
    assert (tmp_path / "out/config.json").is_file()


@pytest.mark.parametrize("shards", [1, 2])
def test_a_head_tied_to_its_embedding_is_left_to_be_tied(tmp_path: Path, shards: int) -> None:
    state = llamas.tensors(0)
    llamas.write(tmp_path / "m0", {n: t for n, t in state.items() if n != "lm_head.weight"})
    pickled(tmp_path / "m0")
    folder = tmp_path / "m0"
    state = torch.load(folder / "pytorch_model.bin")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    if shards == 2:
        index = {"weight_map": dict.fromkeys(state, "pytorch_model.bin")}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    config = {"merge_method": "passthrough", "models": [{"model": str(folder)}]}
    report = nf.merge(config, tmp_path / "out")
    assert "'lm_head.weight' is 'model.embed_tokens.weight'" in str(report)
    assert llamas.load(tmp_path / "out").keys() == state.keys() - {"lm_head.weight"}


def test_safetensors_are_read_where_there_are_both(tmp_path: Path) -> None:
    stored = llamas.write(tmp_path / "m0", llamas.tensors(0))
    torch.save(llamas.tensors(1), tmp_path / "m0/pytorch_model.bin")
    config = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "m0")}]}
    report = nf.merge(config, tmp_path / "out")
    assert "has safetensors and pytorch_model.bin; the safetensors are read" in str(report)
    got = llamas.load(tmp_path / "out")
    assert all(torch.equal(got[name], tensor) for name, tensor in stored.items())


# -- what is refused ------------------------------------------------------------------------------


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": Evil(tmp_path / "ran")}, tmp_path / "evil.bin")
    assert "broken, or more than tensors: " in refusal(tmp_path / "evil.bin")
    assert "mkdir" in refusal(tmp_path / "evil.bin")
    assert not (tmp_path / "ran").exists()


def test_the_old_format_is_refused_with_its_conversion(
    python: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "old.bin"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    text = refusal(path)
    assert "PyTorch's old format" in text
    _, _, *command = shlex.split(text[text.index("python -c") :])
    assert python(*command).returncode == 0
    assert torch.equal(read(path)["a"], torch.ones(2))


def test_every_tensor_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    state = {
        "turned": torch.randn(3, 4).T,
        "complex": torch.zeros(2, dtype=torch.complex64),
        "sparse": torch.eye(3).to_sparse(),
        "fine": torch.ones(1),
    }
    torch.save(state, tmp_path / "x.pt")
    text = refusal(tmp_path / "x.pt")
    assert "'turned' must be contiguous: save it so" in text
    assert "'complex' has dtype torch.complex64, which is not read" in text
    assert "'sparse' must be dense" in text
    assert "fine" not in text


def test_what_is_not_a_dict_of_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save([torch.ones(2)], path)
    assert "must be a dict of tensors by name, got list" in refusal(path)
    torch.save({"a": torch.ones(2), "epoch": 3, 7: torch.ones(1)}, path)
    text = refusal(path)
    assert "'epoch' is int, not a tensor" in text and "'7' is Tensor" in text
    path.write_bytes(b"")
    assert "not a zip archive of torch.save" in refusal(path)
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))
    assert "TorchScript" in refusal(path)
    with pytest.raises(FileNotFoundError):
        open_checkpoint(tmp_path / "none.pt")


def rewritten(path: Path, change: Any, compression: int = zipfile.ZIP_STORED) -> None:
    """The same archive with records changed: bytes, or None where there is none."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            new = change(name.partition("/")[2], data)
            # Without it, PyTorch looks for records instead of computing where they lie.
            if new is not None and ".format_version" not in name:
                archive.writestr(name, new)


def test_archives_that_contradict_themselves(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"

    def saved() -> None:
        torch.save({"a": torch.arange(6.0), "b": torch.ones(2)}, path)

    saved()
    rewritten(path, lambda name, data: data)
    assert torch.equal(read(path)["a"], torch.arange(6.0))
    rewritten(path, lambda name, data: data[:-4] if name == "data/0" else data)
    assert "'a' needs 24 bytes of a storage, which has 20" in refusal(path)
    saved()
    rewritten(path, lambda name, data: None if name == "data/1" else data)
    assert "broken" in refusal(path)
    saved()
    rewritten(path, lambda name, data: b"big" if name == "byteorder" else data)
    assert "not little-endian" in refusal(path)
    saved()
    rewritten(path, lambda name, data: data, zipfile.ZIP_DEFLATED)
    assert "broken" in refusal(path)
    saved()
    path.write_bytes(path.read_bytes()[:-30])
    assert "broken" in refusal(path)


def test_changed_bytes_are_an_error_or_another_checkpoint(tmp_path: Path) -> None:
    """Whatever a file says, nothing outside of it would be read."""
    path = tmp_path / "x.pt"
    torch.save({"a": torch.arange(6.0), "b": torch.ones(2).half()}, path)
    data = path.read_bytes()
    g = torch.Generator().manual_seed(0)
    for at in torch.randint(len(data), (300,), generator=g).tolist():
        changed = bytearray(data)
        changed[at] ^= 1 << (at % 8)
        path.write_bytes(changed)
        try:
            found = open_checkpoint(path)
        except ValueError as error:
            assert "x.pt" in str(error)
            continue
        for entry in found.entries.values():
            assert 0 <= entry.start <= entry.stop <= len(data)
