"""Folders of weights: safetensors files or those of ``torch.save``, one or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .._checks import did_you_mean, raise_all
from . import pickles
from .headers import INDEX, SINGLE, Entry, Header, read_header, unique

_PICKLE_INDEX, _PICKLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
_KINDS = ((INDEX, SINGLE, (".safetensors",)), (_PICKLE_INDEX, _PICKLE, pickles.SUFFIXES))
_HEAD = "lm_head.weight"


class Checkpoint(NamedTuple):
    """All tensors of a model by name, in the order of files and of their bytes in them.

    Attributes:
        path: of its folder or file.
        beside: other files that decide what the tensors are.
        notes: what is worth knowing, in words.
    """

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    beside: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def files(self) -> list[Path]:
        """Those that decide what its tensors are."""
        found = {file for entry in self.entries.values() for file in entry.files}
        return sorted(found.union(self.beside))

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(entry.bytes for entry in self.entries.values())


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A file of weights, or a folder with one, or with shards and their index.

    Safetensors are read where there are both kinds of files. Files that an index does not name are
    not read: they may be left over from an earlier run.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a folder without weights; an index that names files outside of the folder, or
            that disagrees with its files; a broken file. Everything that is wrong, at once.
    """
    path = Path(path)
    if path.is_file():
        return _of_headers(path, [_header(path)])
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    for index, single, suffixes in _KINDS:
        if (path / index).is_file():
            return _finished(_sharded(path / index))
        if (path / single).is_file():
            return _finished(_of_headers(path, [_header(path / single)]))
        files = sorted(file for file in path.iterdir() if file.suffix in suffixes)
        if len(files) == 1:
            return _finished(_of_headers(path, [_header(files[0])]))
        if files:
            break
    found = ", ".join(file.name for file in files[:4]) or "none"
    raise ValueError(
        f"{path}: needs {SINGLE}, or {INDEX} with its shards, or one .safetensors file, or the "
        f"like of torch.save; found {found}"
    )


def json_object(path: Path, text: bytes) -> dict[str, Any]:
    """What a configuration says.

    Raises:
        ValueError: no JSON, or not of names and values.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must be a JSON object, got {type(content).__name__}")
    return content


def _header(path: Path) -> Header:
    read = pickles.read_header if path.suffix in pickles.SUFFIXES else read_header
    return read(path)


def _finished(found: Checkpoint) -> Checkpoint:
    """As transformers' safetensors files are: without a head that is the embedding."""
    pickled = [name for name in (_PICKLE_INDEX, _PICKLE) if (found.path / name).is_file()]
    if not pickled:
        return found
    if any(file.suffix == ".safetensors" for file in found.files):
        note = f"{found.path}: has safetensors and {pickled[0]}; the safetensors are read"
        return found._replace(notes=(*found.notes, note))
    others = {_place(e): name for name, e in found.entries.items() if not name.endswith(_HEAD)}
    entries = dict(found.entries)
    notes = list(found.notes)
    for name, entry in found.entries.items():
        same = others.get(_place(entry))
        if name.endswith(_HEAD) and same is not None:
            del entries[name]
            notes.append(f"{found.path}: {name!r} is {same!r}, to which it is left to be tied")
    return found._replace(entries=entries, notes=tuple(notes))


def _place(entry: Entry) -> tuple[object, ...]:
    return entry.file, entry.start, entry.dtype, entry.shape


def _sharded(index: Path) -> Checkpoint:
    folder = index.parent
    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=unique)
        weight_map = content["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: no index of shards with a weight_map ({error})") from error
    files = sorted(set(names.values()))
    # Looked up among the names that there are: what an index says is no path until then.
    there = {path.name for path in folder.iterdir() if path.is_file()}
    faults = [
        f"names the file {file[:80]!r}, which is not one of this folder's"
        for file in files
        if file not in there
    ]
    raise_all(str(index), faults)
    checkpoint = _of_headers(folder, [_header(folder / file) for file in files])
    for name, file in names.items():
        entry = checkpoint.entries.get(name)
        if entry is None or entry.file.name != file:
            hint = did_you_mean(name, checkpoint.entries) if entry is None else ""
            faults.append(f"{name!r} is not in {file}{hint}")
    unnamed = [name for name in checkpoint.entries if name not in names]
    faults += [f"{name!r} is in {checkpoint.entries[name].file.name} alone" for name in unnamed]
    raise_all(str(index), faults)
    return checkpoint


def _of_headers(path: Path, headers: list[Header]) -> Checkpoint:
    entries: dict[str, Entry] = {}
    faults = []
    for header in headers:
        for entry in header.entries:
            if entry.name in entries:
                both = f"{entries[entry.name].file.name} and {entry.file.name}"
                faults.append(f"{entry.name!r} is in {both}")
            entries[entry.name] = entry
    raise_all(str(path), faults)
    metadata = {k: v for header in headers for k, v in header.metadata.items()}
    return Checkpoint(path, entries, metadata)
