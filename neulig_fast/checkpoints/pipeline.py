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
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..methods import BLOCK, Method, Statistic, Tile
from .measured import added, answer, applied
from .planned import Planned
from .read import Reader
from .resources import Resources, in_pytorch
from .workspace import Workspace, device_elements, tile_elements
from .write import Staging

# Elements of a tile: rows of some models stay in a processor's caches between being read and being
# measured or merged.
_STREAMED = 1 << 19

Job: TypeAlias = Sequence[Planned]  # a tensor of every output, from the same sources


def _streamed(device: torch.device) -> int:
    """Elements of a tile; a block where formulas in PyTorch take a multiple of it besides."""
    return BLOCK if in_pytorch(device) else _STREAMED


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

        def merge(worker: Worker, job: Job) -> None:
            missing = self.missing(job)
            if missing:
                worker.merge(missing)

        self.each(jobs, merge)

    def each(self, jobs: Iterable[Job], act: Callable[[Worker, Job], None]) -> None:
        """Have a worker act on every job, all threads at once; raises as :meth:`run`."""
        todo = deque(jobs)
        count = self.resources.threads
        before = torch.get_num_threads()
        self._stopped.clear()
        try:
            with ThreadPoolExecutor(count, thread_name_prefix="merge") as pool:
                working = [pool.submit(self._work, todo, act, number) for number in range(count)]
                try:
                    wait(working, return_when=FIRST_EXCEPTION)
                finally:
                    self._stopped.set()
        finally:
            # The last thread's number is what new threads begin with.
            torch.set_num_threads(before)
        errors = [error for error in (future.exception() for future in working) if error]
        for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
            raise error

    def missing(self, job: Job) -> list[tuple[Staging, Planned]]:
        """Of a job, what is not written yet, and where it belongs."""
        pairs = zip(self.stagings, job, strict=True)
        return [(staging, p) for staging, p in pairs if not p.is_in(staging.sums)]

    def check(self) -> None:
        """Ends a thread whose result nobody waits for any more."""
        if self._stopped.is_set():
            raise Stopped

    def _work(self, todo: deque[Job], act: Callable[[Worker, Job], None], number: int) -> None:
        torch.set_num_threads(1)  # products of matrices may have other bits with more
        worker = Worker(self, self.resources.device(number))
        while True:
            try:
                job = todo.popleft()
            except IndexError:
                return
            with contextlib.suppress(IndexError):
                for source in todo[0][0].sources:
                    self.reader.expect(source)
            act(worker, job)


class Worker:
    """One thread's part in the work: whole tensors, tile by tile, in memory of its own."""

    def __init__(self, pipeline: Pipeline, device: torch.device) -> None:
        self._pipeline, self._method, self._device = pipeline, pipeline.method, device
        gpu = device.type == "cuda"
        self._workspace = Workspace(pipeline.resources.share, pinned=gpu)
        self._stream = torch.cuda.Stream(device) if gpu else None

    def merge(self, missing: Sequence[tuple[Staging, Planned]]) -> None:
        """A tensor, into all outputs that miss it."""
        with torch.cuda.stream(self._stream):  # None: no other stream than the usual
            self._merge(missing)

    def _merge(self, missing: Sequence[tuple[Staging, Planned]]) -> None:
        job = [planned for _, planned in missing]
        writers = [staging.tensor(planned.output.name) for staging, planned in missing]
        asides = [_Aside(self._method, *each) for each in missing if each[1].beside]
        tiles = _Tiles(job[0], self._workspace, self._pipeline, self._device)
        merges = applied(self._method, job, tiles.measure)
        for tile in tiles.merged():
            for aside in asides:
                aside.see(tile)
            for apply, writer in zip(merges, writers, strict=True):
                out = tiles.out(tile)
                apply(tile, out)
                writer.write(tiles.bytes(out))
        for aside in asides:
            aside.finish()
        for writer in writers:
            writer.finish()
        self._pipeline.advance(job[0].bytes + sum(planned.bytes_out for planned in job))

    def measure(self, planned: Planned, place: int, statistics: Sequence[Statistic]) -> list[Any]:
        """Every statistic of the tensor.

        Args:
            place: of the tensor's first element in what is measured.
        """
        with torch.cuda.stream(self._stream):
            tiles = _Tiles(planned, self._workspace, self._pipeline, self._device, place)
            return tiles.answers(statistics)


class _Aside:
    """What a method writes of one tensor beside a result."""

    def __init__(self, method: Method, staging: Staging, planned: Planned) -> None:
        if method.aside is None or planned.task is None:
            raise TypeError(f"{planned.output.name}: {method.name} writes nothing besides")
        self._content = method.aside(planned.task)
        self._writers = [staging.tensor(output.name) for output in planned.beside]

    def see(self, tile: Tile) -> None:
        for number, data in self._content.tile(tile):
            self._writers[number].write(data)

    def finish(self) -> None:
        for number, data in self._content.end():
            self._writers[number].write(data)
        for writer in self._writers:
            writer.finish()


def merged_alone(method: Method, job: Job, rows: Tensor, out: Tensor) -> None:
    """Merge a tensor whose elements are at hand, ``rows`` (N, P), into ``out`` (P,), again and
    again for all outputs."""
    tile = Tile(rows, 0)
    for apply in applied(method, job, lambda statistic: answer(statistic, tile)):
        apply(tile, out)


class _Tiles:
    """A tensor's tiles, read into a workspace and moved to the device.

    A tensor that is looked at first and fits as a whole is read once and stays. Tiles are small
    ones, but where a tensor is looked at on a GPU, or a list of values of tiles is wanted. What is
    merged are the same tiles then, on a GPU or where they might have cut what the method computes.
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
        self._views = workspace.views(planned, self._fits)
        self._rows = self._views.rows
        if device.type != "cpu":
            self._rows = torch.empty_like(self._rows, device=device)
        self._step = min(self._fits, max(_streamed(device) // planned.grain, 1) * planned.grain)
        self._stays, self._known = False, 0  # how many elements were read to stay

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
            room = min(self._fits, BLOCK) if in_pytorch(self._device) else self._fits
            self._stays = room >= self._elements
            return statistic.of(next(self._tiles(self._fits))) if self._stays else None
        return self.answers([statistic])[0]

    def answers(self, statistics: Sequence[Statistic]) -> list[Any]:
        """Every statistic of the tensor, or of the tiles that it is of, as its ``over`` says."""
        self._stays, step = self._fits >= self._elements, self._step
        if self._device.type != "cpu" or any(s.over == "tiles" for s in statistics):
            step = self._fits
        if self._device.type != "cpu" or self._planned.grain != BLOCK:
            self._step = step
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
