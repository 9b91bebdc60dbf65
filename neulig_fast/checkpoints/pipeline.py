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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..methods import Method, Statistic, Tile
from .measured import answer, applied
from .planned import Planned
from .read import Reader
from .resources import Resources
from .tiles import Tiles
from .workspace import Workspace, whole_bytes
from .write import Staging

Job: TypeAlias = Sequence[Planned]  # a tensor of every output, from the same sources


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
        self.needed = 0  # bytes of a thread's buffers that there is use for

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
        self.needed = max((whole_bytes(planned) for job in todo for planned in job), default=0)
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
        self._workspace = Workspace(pipeline.resources.share, pipeline.needed, pinned=gpu)
        self._stream = torch.cuda.Stream(device) if gpu else None

    def merge(self, missing: Sequence[tuple[Staging, Planned]]) -> None:
        """A tensor, into all outputs that miss it."""
        with torch.cuda.stream(self._stream):  # None: no other stream than the usual
            self._merge(missing)

    def _merge(self, missing: Sequence[tuple[Staging, Planned]]) -> None:
        job = [planned for _, planned in missing]
        writers = [staging.tensor(planned.output.name) for staging, planned in missing]
        asides = [_Aside(self._method, *each) for each in missing if each[1].beside]
        tiles = Tiles(job[0], self._workspace, self._pipeline, self._device)
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
            tiles = Tiles(planned, self._workspace, self._pipeline, self._device, place)
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
