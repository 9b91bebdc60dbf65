"""What a checkpoint holds, from its headers alone: no weight is read, and no torch imported.

A safetensors file begins with the length of its header in eight bytes, then the header, a JSON
object of tensors; the rest is their bytes. Files come from strangers: every number is checked
before it is used, and everything that is wrong with a file is listed at once.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from .._checks import did_you_mean, raise_all

# Bytes per element of the format's types.
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
_LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Entry(NamedTuple):
    """One tensor of a file: bytes ``start .. stop`` of it, counted from the file's first."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """How many."""
        return prod(self.shape)


class Header(NamedTuple):
    """A file's tensors in the order of their bytes, and its metadata."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """The header of one safetensors file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a whole safetensors file, or one that contradicts itself; all faults.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError(f"{path}: not a safetensors file: {size} bytes")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(
                f"{path}: not a whole safetensors file: its header would have {length} bytes, "
                f"the file has {size}"
            )
        text = file.read(length)
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is not the JSON of safetensors ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: the header is not a JSON object of tensors")
    metadata = content.pop("__metadata__", {})
    faults = list(_metadata_faults(metadata))
    faults += [fault for name, entry in content.items() for fault in _entry_faults(name, entry)]
    raise_all(str(path), faults)
    begin = 8 + length
    entries = [
        Entry(
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            path,
            begin + entry["data_offsets"][0],
            begin + entry["data_offsets"][1],
        )
        for name, entry in content.items()
    ]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    raise_all(str(path), _layout_faults(entries, begin, size))
    return Header(tuple(entries), metadata)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} appears twice")
        found[key] = value
    return found


def _metadata_faults(metadata: Any) -> Iterator[str]:
    texts = isinstance(metadata, dict) and all(isinstance(v, str) for v in metadata.values())
    if not texts:
        yield f"__metadata__ must be an object of texts, got {str(metadata)[:60]}"


def _entry_faults(name: str, entry: Any) -> Iterator[str]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        yield f"{name!r} must have dtype, shape and data_offsets, got {str(entry)[:60]}"
        return
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        yield f"{name!r} has dtype {str(dtype)[:20]!r}, none of {', '.join(ITEM_BYTES)}"
        return
    if not _counts(shape):
        yield f"{name!r} must have a shape of counts, got {str(shape)[:60]}"
    elif not _counts(offsets) or len(offsets) != 2:
        yield f"{name!r} must have two data_offsets, got {str(offsets)[:60]}"
    elif offsets[1] - offsets[0] != prod(shape) * ITEM_BYTES[dtype]:
        needs = prod(shape) * ITEM_BYTES[dtype]
        yield f"{name!r} has {offsets[1] - offsets[0]} bytes, its shape and dtype need {needs}"


def _counts(value: Any) -> bool:
    whole = isinstance(value, list) and all(type(n) is int for n in value)
    return whole and all(0 <= n < 2**63 for n in value)


def _layout_faults(entries: list[Entry], begin: int, size: int) -> Iterator[str]:
    """The format leaves no byte unused or used twice."""
    at = begin
    for entry in entries:
        if entry.start != at:
            what = "overlaps what is" if entry.start < at else "leaves a gap to what is"
            yield f"{entry.name!r} {what} before it: it starts at byte {entry.start}, not {at}"
        at = max(at, entry.stop)
    if at != size:
        yield f"the tensors end at byte {at}, the file has {size}"


# -- folders --------------------------------------------------------------------------------------


class Checkpoint(NamedTuple):
    """All tensors of a model by name, in the order of files and of their bytes in them."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    @property
    def files(self) -> list[Path]:
        """Those with its tensors."""
        return sorted({entry.file for entry in self.entries.values()})

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(entry.stop - entry.start for entry in self.entries.values())


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A safetensors file, or a folder with one, or with shards and their index.

    Files that an index does not name are not read: they may be left over from an earlier run.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a folder without safetensors; an index that names files outside of the folder,
            or that disagrees with its files; a broken file. Everything that is wrong, at once.
    """
    path = Path(path)
    if path.is_file():
        return _of_headers(path, [read_header(path)])
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if (path / INDEX).is_file():
        return _sharded(path)
    if (path / SINGLE).is_file():
        return _of_headers(path, [read_header(path / SINGLE)])
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files[:4]) or "none"
        raise ValueError(
            f"{path}: needs {SINGLE}, or {INDEX} with its shards, or one .safetensors file; "
            f"found {found}"
        )
    return _of_headers(path, [read_header(files[0])])


def _sharded(folder: Path) -> Checkpoint:
    index = folder / INDEX
    try:
        content = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        weight_map = content["weight_map"]
        names = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: no index of shards with a weight_map ({error})") from error
    files = sorted(set(names.values()))
    faults = [
        f"names the file {file!r}, which is not one of this folder's"
        for file in files
        if Path(file).name != file or not (folder / file).is_file()
    ]
    raise_all(str(index), faults)
    checkpoint = _of_headers(folder, [read_header(folder / file) for file in files])
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
