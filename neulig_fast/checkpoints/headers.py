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
from typing import TYPE_CHECKING, Any, NamedTuple

from .._checks import raise_all
from . import dtypes

if TYPE_CHECKING:
    from .low_rank import LowRank
    from .rows import Rows

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
    """One tensor of a file: bytes ``start .. stop`` of it, counted from the file's first.

    Attributes:
        update: what is added to the values there.
        rows: where its rows come from instead, if not all from there.
        like: the type of the tensor whose place it took; a result has that.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int
    update: LowRank | None = None
    rows: Rows | None = None
    like: str | None = None

    @property
    def elements(self) -> int:
        """How many."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """To be read, once."""
        if self.rows is not None:
            return self.rows.bytes
        return self.stop - self.start + (self.update.bytes if self.update else 0)

    @property
    def is_made(self) -> bool:
        """Whether its values are put together or computed while it is read."""
        return self.update is not None or self.rows is not None

    @property
    def parts(self) -> tuple[Entry, ...]:
        """Tensors of files that it is read from, apart from updates."""
        return self.rows.sources if self.rows is not None else (self,)

    @property
    def files(self) -> set[Path]:
        """Those that its values come from."""
        updates = [part.update for part in self.parts if part.update is not None]
        factors = [factor for update in updates for factor in (update.left, update.right)]
        return {entry.file for entry in (*self.parts, *factors)}

    @property
    def held(self) -> str:
        """The type that holds its values: its own, or that in which they are computed."""
        if self.rows is not None:
            return self.rows.held
        if self.update is None:
            return self.dtype
        factors = (self.update.left.dtype, self.update.right.dtype)
        return dtypes.common([self.dtype, *factors, "F32"])

    def fixed_scratch(self, item: int) -> int:
        """Bytes that reading takes into elements of ``item`` bytes, however few of them."""
        if self.rows is not None:
            return self.rows.scratch_bytes(item)
        return self.update.scratch_bytes(item) if self.update is not None else 0


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
        content = json.loads(text, object_pairs_hook=unique)
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


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are different; for ``json.loads``.

    Raises:
        ValueError: they are not.
    """
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
