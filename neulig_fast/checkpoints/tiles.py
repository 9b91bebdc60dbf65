"""The tiles of one tensor: read into a thread's memory, looked at, merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..methods import BLOCK, Statistic, Tile
from .measured import added
from .planned import Planned
from .resources import in_pytorch
from .workspace import Workspace, device_elements, tile_elements

if TYPE_CHECKING:
    from .pipeline import Pipeline

# Elements of a tile: rows of some models stay in a processor's caches between being read and being
# measured or merged.
_STREAMED = 1 << 19
# Bytes of inputs that stay between being looked at and being merged. Larger ones are read once more
# from the system's cache, which takes less time than new memory to keep them in.
_KEPT = 64 << 20


def _streamed(device: torch.device) -> int:
    """Elements of a tile; a block where formulas in PyTorch take a multiple of it besides."""
    return BLOCK if in_pytorch(device) else _STREAMED


class Tiles:
    """A tensor's tiles, read into a workspace and moved to the device.

    Tiles are small ones, but where a tensor is looked at on a GPU, or a list of values of tiles is
    wanted. What is merged are the same tiles then, on a GPU or where they might have cut what the
    method computes. A tensor that is looked at as a whole, and one that is looked at first and is
    not large, is read once and stays.
    """

    def __init__(
        self,
        planned: Planned,
        workspace: Workspace,
        pipeline: Pipeline,
        device: torch.device,
        place: int = 0,
    ) -> None:
        self._planned, self._pipeline, self._device = planned, pipeline, device
        self._place, self._elements = place, planned.output.elements
        self._fits = tile_elements(planned, workspace.bytes)
        share = pipeline.resources.device_share
        if share is not None:
            self._fits = min(self._fits, device_elements(planned, share))
        self._workspace = workspace
        self._step = min(self._fits, max(_streamed(device) // planned.grain, 1) * planned.grain)
        self._hold(self._step, stays=False)

    def _hold(self, elements: int, stays: bool) -> None:
        """Have memory for a tile of so many elements, or for all of them, to stay."""
        self._views = self._workspace.views(self._planned, elements)
        self._rows = self._views.rows
        if self._device.type != "cpu":
            self._rows = torch.empty_like(self._rows, device=self._device)
        self._stays, self._known = stays, 0  # how many elements were read to stay

    def merged(self) -> Iterator[Tile]:
        """All tiles in order."""
        return self._tiles(self._step)

    def _tiles(self, step: int, starts: frozenset[int] | None = None) -> Iterator[Tile]:
        """All tiles in order, or those with some starts."""
        for start in range(0, self._elements, step):
            if starts is None or self._place + start in starts:
                self._pipeline.check()
                yield self._tile(start, min(step, self._elements - start))

    def _tile(self, start: int, length: int) -> Tile:
        place = slice(start, start + length) if self._stays else slice(length)
        if not self._stays:
            self._read(start, place)
        elif start + length > self._known:
            self._read(self._known, slice(self._known, start + length))
            self._known = start + length
        return Tile(self._rows[:, place], self._place + start)

    def _read(self, start: int, place: slice) -> None:
        """Elements ``start ..`` into a place of the rows."""
        rows = self._views.rows[:, place]
        for source, row in zip(self._planned.sources, rows, strict=True):
            self._pipeline.reader.read(source, start, row, self._views.scratch)
        if self._rows is not self._views.rows:
            self._rows[:, place].copy_(rows, non_blocking=True)

    def _is_kept(self) -> bool:
        made = any(source.is_made for source in self._planned.sources)
        return made or self._planned.bytes <= _KEPT

    def out(self, tile: Tile) -> Tensor:
        """Where the result of a tile goes, on the device."""
        length = tile.rows.shape[1]
        out = self._views.out[:length]
        return out if self._device.type == "cpu" else torch.empty_like(out, device=self._device)

    def bytes(self, out: Tensor) -> memoryview:
        """A result's, on the CPU."""
        if self._device.type != "cpu":
            out = self._views.out[: len(out)].copy_(out)
        return memoryview(out.view(torch.uint8).numpy())

    def measure(self, statistic: Statistic) -> Any:
        """A statistic of the tensor, as its ``over`` says."""
        if statistic.over != "whole":
            return self.answers([statistic])[0]
        room = min(self._fits, BLOCK) if in_pytorch(self._device) else self._fits
        if room < self._elements:
            return None
        if not self._stays:
            self._hold(self._fits, stays=True)
        return statistic.of(next(self._tiles(self._fits)))

    def answers(self, statistics: Sequence[Statistic]) -> list[Any]:
        """Every statistic of the tensor, or of the tiles that it is of, as its ``over`` says."""
        gpu = self._device.type != "cpu"
        large = gpu or any(s.over == "tiles" for s in statistics)
        step = self._fits if large else self._step
        if gpu or self._planned.grain != BLOCK:
            self._step = step
        if not self._stays:
            stays = self._fits >= self._elements and (large or self._is_kept())
            self._hold(self._fits if stays else step, stays)
        found: list[Any] = [[] if s.over == "tiles" else None for s in statistics]
        asked = [statistic.starts for statistic in statistics]
        every = None if None in asked else frozenset().union(*(s for s in asked if s is not None))
        for tile in self._tiles(step, every):
            for k, statistic in enumerate(statistics):
                if statistic.starts is not None and tile.start not in statistic.starts:
                    continue
                value = statistic.of(tile)
                if statistic.over == "blocks":
                    found[k] = added(found[k], value)
                else:
                    found[k].append(value)
        return found
