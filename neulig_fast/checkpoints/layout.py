"""Where every tensor of a checkpoint to be written lies: known before the first weight is read.

Shapes and dtypes of the result are known from the headers of the inputs, and so are its shards,
their headers and each tensor's place. Tensors can then be written in any order, by any thread, and
one that was written already needs no second time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import NamedTuple

from .._checks import raise_all
from .headers import ITEM_BYTES, SINGLE

_ALIGNMENT = 8  # of the first tensor in a file
_METADATA = {"format": "pt"}  # without it, transformers refuses a file


class Output(NamedTuple):
    """A tensor of the result."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Of its elements."""
        return self.elements * ITEM_BYTES[self.dtype]


class Place(NamedTuple):
    """Bytes ``start .. stop`` of a file."""

    file: str
    start: int
    stop: int


class Shard(NamedTuple):
    """A file: its name, what it begins with, and its size in bytes."""

    name: str
    header: bytes
    bytes: int


class Layout(NamedTuple):
    """All files of a checkpoint, and where each tensor lies in them.

    Attributes:
        aside: the file, one of them, that holds no weights.
    """

    shards: tuple[Shard, ...]
    places: Mapping[str, Place]
    aside: str | None = None

    @property
    def bytes(self) -> int:
        """Of all files but the index."""
        return sum(shard.bytes for shard in self.shards)

    def index_text(self) -> str | None:
        """The text of the index of shards, as Hugging Face writes it; None for a single file."""
        places = {n: place for n, place in self.places.items() if place.file != self.aside}
        if SINGLE in (shard.name for shard in self.shards):
            return None
        total = sum(place.stop - place.start for place in places.values())
        weight_map = {name: place.file for name, place in sorted(places.items())}
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        return json.dumps(content, indent=2) + "\n"


class Beside(NamedTuple):
    """A file beside the weights: its name, metadata and tensors."""

    file: str
    metadata: Mapping[str, str]
    outputs: Sequence[Output]


def lay_out(outputs: Sequence[Output], shard_bytes: int, beside: Beside | None = None) -> Layout:
    """Fill shards in order; a tensor that is larger than ``shard_bytes`` gets one of its own.

    Raises:
        ValueError: a tensor beside the weights has the name of one of theirs.
    """
    groups: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if groups[-1] and filled + output.bytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(output)
        filled += output.bytes
    many = len(groups) > 1
    shards, places = [], {}
    for k, group in enumerate(groups, 1):
        name = f"model-{k:05d}-of-{len(groups):05d}.safetensors" if many else SINGLE
        shard, found = _shard(name, group, _METADATA)
        shards.append(shard)
        places.update(found)
    if beside is None:
        return Layout(tuple(shards), places)
    shard, found = _shard(beside.file, beside.outputs, beside.metadata)
    twice = [f"{name!r} is a tensor of the weights too" for name in found if name in places]
    raise_all(beside.file, twice)
    return Layout((*shards, shard), {**places, **found}, beside.file)


def _shard(
    name: str, outputs: Iterable[Output], metadata: Mapping[str, str]
) -> tuple[Shard, dict[str, Place]]:
    """Widest elements first, so that every tensor is aligned to its own."""
    entries: dict[str, object] = {"__metadata__": metadata}
    spans = {}
    at = 0
    for output in sorted(outputs, key=lambda output: -ITEM_BYTES[output.dtype]):
        spans[output.name] = (at, at + output.bytes)
        entries[output.name] = {
            "dtype": output.dtype,
            "shape": list(output.shape),
            "data_offsets": [at, at + output.bytes],
        }
        at += output.bytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    begin = len(header)
    places = {n: Place(name, begin + start, begin + stop) for n, (start, stop) in spans.items()}
    return Shard(name, header, begin + at), places
