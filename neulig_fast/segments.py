"""The layout of one arena row: which columns belong to which tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any, Literal, NamedTuple, overload

import torch

from . import _checks

Kind = Literal["parameter", "buffer"]


class Segment(NamedTuple):
    """One tensor of a row: ``row[start : start + length].view(shape)``.

    ``start`` and ``length`` count elements. ``dtype`` is what the experts stored, which may be
    narrower than the arena's.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    dtype: torch.dtype
    kind: Kind


class Segments(Sequence[Segment]):
    """The tensors of a row in column order: parameters first, then buffers.

    Args:
        segments: in column order, not overlapping; parameters before buffers.
        width: columns of a row, padding included (P).
        alignment: elements; every start and the width are multiples of it.

    Raises:
        ValueError: a layout that breaks one of these rules; all breaches are listed.
    """

    def __init__(self, segments: Iterable[Segment], width: int, alignment: int = 1) -> None:
        self._segments = tuple(segments)
        self.width = int(width)
        self.alignment = int(alignment)
        _checks.raise_all("Segments", _faults(self._segments, self.width, self.alignment))
        starts = [segment.start for segment in self._segments]
        self._bounds = torch.tensor([*starts, self.width], dtype=torch.int64, device="cpu")
        self._bounds_on = {self._bounds.device: self._bounds}
        self._index = {segment.name: i for i, segment in enumerate(self._segments)}

    @classmethod
    def pack(
        cls,
        tensors: Iterable[tuple[str, tuple[int, ...], torch.dtype, Kind]],
        alignment: int,
    ) -> Segments:
        """Lay (name, shape, dtype, kind) out in order, each start rounded up to ``alignment``."""
        segments, start = [], 0
        for name, shape, dtype, kind in tensors:
            segments.append(Segment(name, shape, start, prod(shape), dtype, kind))
            start = -(-(start + prod(shape)) // alignment) * alignment
        return cls(segments, start, alignment)

    @overload
    def __getitem__(self, key: int) -> Segment: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Segment, ...]: ...
    def __getitem__(self, key: int | slice) -> Segment | tuple[Segment, ...]:
        return self._segments[key]

    def __len__(self) -> int:
        return len(self._segments)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._segments)

    def __repr__(self) -> str:
        return f"Segments({len(self)} tensors, width {self.width:,})"

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' state-dict keys, in column order."""
        return tuple(self._index)

    def index(self, name: Any, start: int = 0, stop: int | None = None) -> int:
        """Position of the tensor called ``name`` (or of a :class:`Segment`).

        Raises:
            ValueError: no such tensor between ``start`` and ``stop``.
        """
        wanted = name.name if isinstance(name, Segment) else name
        found = self._index.get(wanted, -1)
        if found not in range(len(self))[start:stop]:
            hint = _checks.did_you_mean(str(wanted), self._index)
            raise ValueError(f"Segments: no tensor called {wanted!r}{hint}")
        return found

    @property
    def bounds(self) -> torch.Tensor:
        """(S + 1,) int64 on the CPU: 0 = bounds[0] <= ... <= bounds[S] = P.

        Segment s covers columns bounds[s] up to bounds[s + 1], so padding belongs to the tensor
        before it. Shared: do not write to it.
        """
        return self._bounds

    def bounds_on(self, device: torch.device | str) -> torch.Tensor:
        """:attr:`bounds` on ``device``, copied there once."""
        device = torch.device(device)
        if device not in self._bounds_on:
            self._bounds_on[device] = self._bounds.to(device)
        return self._bounds_on[device]

    def parameters(self) -> Segments:
        """The leading part of the layout that holds parameters; its width ends at a boundary."""
        kept = [segment for segment in self._segments if segment.kind == "parameter"]
        return Segments(kept, int(self._bounds[len(kept)]), self.alignment)

    def layers(self) -> list[str]:
        """The layer every tensor belongs to, one label per segment.

        The label is the name up to and including its first numeric component
        (``visual.transformer.resblocks.3.attn.in_proj_weight`` is of layer
        ``visual.transformer.resblocks.3``), else the path of the module that owns the tensor
        (``visual.conv1.weight``: ``visual.conv1``). A tensor of the root module is a layer itself.
        """
        return [_layer(segment.name) for segment in self._segments]


def _layer(name: str) -> str:
    parts = name.split(".")
    for depth, part in enumerate(parts, start=1):
        if part.isdecimal():
            return ".".join(parts[:depth])
    return ".".join(parts[:-1]) or name


def _faults(segments: tuple[Segment, ...], width: int, alignment: int) -> list[str]:
    if alignment < 1:
        return [f"alignment must be at least 1 element, got {alignment}"]
    faults, end, seen, buffers = [], 0, set(), False
    for segment in segments:
        name, start = segment.name, segment.start
        if name in seen:
            faults.append(f"{name} appears twice")
        if segment.length != prod(segment.shape):
            faults.append(f"{name} has length {segment.length} but shape {segment.shape}")
        if start < end:
            faults.append(f"{name} starts at {start}, before the previous tensor ends at {end}")
        if start % alignment:
            faults.append(f"{name} starts at {start}, not a multiple of {alignment}")
        if buffers and segment.kind == "parameter":
            faults.append(f"{name} is a parameter behind a buffer")
        seen.add(name)
        end, buffers = max(end, start + segment.length), buffers or segment.kind == "buffer"
    if segments and segments[0].start != 0:
        faults.append(
            f"{segments[0].name} starts at {segments[0].start}, the first must start at 0"
        )
    if width < end or width % alignment or (not segments and width):
        faults.append(
            f"width must be a multiple of {alignment} that holds {end} elements"
            f"{'' if segments else ' (0 without tensors)'}, got {width}"
        )
    return faults
