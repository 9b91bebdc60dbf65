"""Reading, merging and writing, by as many threads as there are processors.

A thread takes the next tensor, reads a tile of all models into its own memory, merges and writes
it, and so on to the tensor's end; while one waits for the disk, others compute. Nothing depends on
who did what: statistics are added up block after block, and every tensor has its place in the
result. Memory is taken once and is all that there is, however large the models are.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..methods import Method, Statistic, Tile
from .measured import applied
from .plan import Planned
from .read import Reader
from .workspace import Workspace, tile_elements
from .write import Staging

# Elements of a tile: rows of some models stay in a processor's caches between being read and being
# measured or merged.
_STREAMED = 1 << 19

Job: TypeAlias = Sequence[Planned]  # a tensor of every output, from the same sources


class Resources(NamedTuple):
    """What a merge may use.

    Attributes:
        threads: that read, merge and write.
        memory: bytes of buffers, of all threads.
        device: where tiles are merged.
    """

    threads: int
    memory: int
    device: torch.device = torch.device("cpu")


class Stopped(Exception):
    """Another thread failed, or the user asked for an end."""


class Pipeline:
    """Merges tensors into stagings, one for each output.

    Args:
        method: how.
        reader: of all models.
        stagings: in the order of a job's tensors.
        resources: what may be used.
        advance: told of bytes that were read and written, from any thread.
    """

    def __init__(
        self,
        method: Method,
        reader: Reader,
        stagings: Sequence[Staging],
        resources: Resources,
        advance: Callable[[int], Any] = int,
    ) -> None:
        self.method, self.reader, self.stagings = method, reader, stagings
        self.resources, self.advance = resources, advance
        self._stopped = threading.Event()

    def run(self, jobs: Iterable[Job]) -> None:
        """Do the jobs that the stagings do not have yet.

        Raises:
            Whatever a thread meets first; the others end after their tile.
        """
        todo = deque(jobs)
        count = self.resources.threads
        before = torch.get_num_threads()
        with ThreadPoolExecutor(count, thread_name_prefix="merge") as pool:
            working = [pool.submit(self._work, todo) for _ in range(count)]
            try:
                wait(working, return_when=FIRST_EXCEPTION)
            finally:
                self._stopped.set()
        torch.set_num_threads(before)  # the last thread's number is what new threads begin with
        errors = [error for error in (future.exception() for future in working) if error]
        for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
            raise error

    def missing(self, job: Job) -> list[tuple[Staging, Planned]]:
        """Of a job, what is not written yet, and where it belongs."""
        pairs = zip(self.stagings, job, strict=True)
        return [(staging, p) for staging, p in pairs if p.output.name not in staging.sums]

    def check(self) -> None:
        """Ends a thread whose result nobody waits for any more."""
        if self._stopped.is_set():
            raise Stopped

    def _work(self, todo: deque[Job]) -> None:
        torch.set_num_threads(1)  # products of matrices may have other bits with more
        worker = Worker(self)
        while True:
            try:
                job = todo.popleft()
            except IndexError:
                return
            with contextlib.suppress(IndexError):
                for source in todo[0][0].sources:
                    self.reader.expect(source)
            missing = self.missing(job)
            if missing:
                worker.merge(missing)


class Worker:
    """One thread's part in the work: whole tensors, tile by tile, in memory of its own."""

    def __init__(self, pipeline: Pipeline) -> None:
        resources = pipeline.resources
        self._pipeline, self._method, self._device = pipeline, pipeline.method, resources.device
        self._gpu = resources.device.type == "cuda"
        self._workspace = Workspace(resources.memory // resources.threads, pinned=self._gpu)
        self._stream = torch.cuda.Stream(resources.device) if self._gpu else None

    def merge(self, missing: Sequence[tuple[Staging, Planned]]) -> None:
        """A tensor, into all outputs that miss it."""
        with torch.cuda.stream(self._stream):  # None: no other stream than the usual
            self._merge(missing)

    def _merge(self, missing: Sequence[tuple[Staging, Planned]]) -> None:
        job = [planned for _, planned in missing]
        writers = [staging.tensor(planned.output.name) for staging, planned in missing]
        tiles = _Tiles(job[0], self._workspace, self._pipeline, self._device)
        merges = applied(self._method, [planned.task for planned in job], tiles.measure)
        for tile in tiles.read():
            for apply, writer in zip(merges, writers, strict=True):
                out = tiles.out(tile)
                apply(tile, out)
                writer.write(tiles.bytes(out))
        for writer in writers:
            writer.finish()
        self._pipeline.advance(job[0].bytes + sum(planned.output.bytes for planned in job))


def merged_alone(method: Method, job: Job, rows: Tensor, out: Tensor) -> None:
    """Merge a tensor whose elements are at hand, ``rows`` (N, P), into ``out`` (P,), again and
    again for all outputs."""
    tile = Tile(rows, 0)

    def measure(statistic: Statistic) -> Any:
        value = statistic.of(tile)
        if statistic.over == "blocks":
            return _sum([value])
        return [value] if statistic.over == "tiles" else value

    for apply in applied(method, [planned.task for planned in job], measure):
        apply(tile, out)


def _sum(tiles: Iterable[Tensor]) -> Tensor | None:
    """Over all blocks, in order: no other order has the same bits."""
    total = None
    for blocks in tiles:
        if len(blocks) > 0:
            rows = blocks.numpy() if total is None else np.append(total[None], blocks, axis=0)
            total = np.add.accumulate(rows, axis=0)[-1]
    return None if total is None else torch.as_tensor(total)


class _Tiles:
    """A tensor's tiles, read into a workspace and moved to the device.

    A tensor that is looked at again and fits as a whole is read once and stays. Tiles are small
    ones, but for methods that look at tensors on a GPU, and those that wanted a list of values of
    tiles: they know them by now.
    """

    def __init__(
        self, planned: Planned, workspace: Workspace, pipeline: Pipeline, device: torch.device
    ) -> None:
        self._planned, self._pipeline, self._device = planned, pipeline, device
        self._elements = planned.output.elements
        self._fits = tile_elements(planned, workspace.bytes)
        self._views = workspace.views(planned, self._fits)
        self._rows = self._views.rows
        if device.type != "cpu":
            self._rows = torch.empty_like(self._rows, device=device)
        again = pipeline.method.passes > 0
        self._stays = again and self._fits >= self._elements
        self._known = 0  # elements that were read to stay
        small = device.type == "cpu" or not again
        self._step = min(self._fits, _STREAMED) if small else self._fits

    def read(self, step: int | None = None) -> Iterator[Tile]:
        """All tiles in order, of ``step`` elements each if that is given."""
        step = step or self._step
        for start in range(0, self._elements, step):
            self._pipeline.check()
            yield self._tile(start, min(step, self._elements - start))

    def _tile(self, start: int, length: int) -> Tile:
        place = slice(start, start + length) if self._stays else slice(length)
        if not self._stays:
            self._read(start, place)
        elif start + length > self._known:
            self._read(self._known, slice(self._known, start + length))
            self._known = start + length
        return Tile(self._rows[:, place], start)

    def _read(self, start: int, place: slice) -> None:
        """Elements ``start ..`` into a place of the rows."""
        rows = self._views.rows[:, place]
        for source, row in zip(self._planned.sources, rows, strict=True):
            self._pipeline.reader.read(source, start, row, self._views.scratch)
        if self._rows is not self._views.rows:
            self._rows[:, place].copy_(rows, non_blocking=True)

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
        if statistic.over == "whole":
            if self._fits < self._elements:
                return None
            return statistic.of(next(self.read(self._fits)))
        if statistic.over == "tiles":
            self._step = self._fits
        values = (statistic.of(tile) for tile in self.read())
        return list(values) if statistic.over == "tiles" else _sum(values)
