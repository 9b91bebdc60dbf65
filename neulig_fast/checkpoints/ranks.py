"""Several processes on one merge, as torchrun starts them.

All plan the same from the same headers and write into the same folder, each the tensors of its own
part at their places. They tell each other only names and checksums. The first begins, that is
creates the files or finds what an interrupted merge has left, and ends, that is puts the checkpoint
in its place. How many there are changes neither a byte of the result nor what can be resumed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from .pipeline import Job

T = TypeVar("T")
_PATIENCE = timedelta(days=7)  # with one process that has more to do than the others


@dataclass(frozen=True)
class Ranks:
    """This process among all of them."""

    rank: int = 0
    count: int = 1
    group: Any = None  # of torch.distributed; None is the default one

    @property
    def first(self) -> bool:
        """Whether it is the one that begins and ends."""
        return self.rank == 0

    def part(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs of this process: neighbours, with its share of the bytes."""
        total = sum(map(_bytes, jobs))
        found, before = [], 0
        for job in jobs:
            middle = 2 * before + _bytes(job)  # twice, to stay with integers
            if min(middle * self.count // max(2 * total, 1), self.count - 1) == self.rank:
                found.append(job)
            before += _bytes(job)
        return found

    def device(self, name: str) -> str:
        """The device of this process where ``name`` leaves open which: a GPU each, of those that
        it lists, or of all."""
        import torch

        if self.count == 1:
            return name
        names = name.split(",")
        if name in ("auto", "cuda") and torch.cuda.is_available():
            names = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
        return names[int(os.environ.get("LOCAL_RANK", self.rank)) % len(names)].strip()

    def here(self, work: Callable[[], T]) -> T:
        """What ``work`` gives in this process, if it fails in none; raises as :meth:`all`."""
        results: list[T] = []
        self.all(lambda: results.append(work()))
        return results[0]

    def all(self, work: Callable[[], T]) -> list[T]:
        """What ``work`` gives in every process, in their order; or the failure of any.

        Raises:
            What ``work`` raised here; RuntimeError: what it raised elsewhere.
        """
        if self.count == 1:
            return [work()]
        try:
            mine: tuple[T | None, str | None] = work(), None
            failure = None
        except (OSError, ValueError, RuntimeError) as error:  # told to the others, then raised
            mine, failure = (None, f"{type(error).__name__}: {error}"), error
        every = _exchange(mine, self.count, self.group)
        if failure is not None:
            raise failure
        failed = list(_failures(every))
        if failed:
            raise RuntimeError("merge: " + "; ".join(failed))
        return [result for result, _ in every]


def speaks() -> bool:
    """Whether this process is the one that prints."""
    return os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def torchrun() -> Iterator[Ranks]:
    """The processes that torchrun started, connected for as long; this one alone without it.

    Raises:
        ValueError: started by something that says only half of what is needed.
    """
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if not os.environ.keys() & {"RANK", "WORLD_SIZE"}:
        yield Ranks()
        return
    lost = [name for name in names if name not in os.environ]
    if lost:
        raise ValueError(f"merge: {', '.join(lost)} not set: start several processes by torchrun")
    import torch.distributed as dist

    ours, group = not dist.is_initialized(), None
    if ours:
        dist.init_process_group("gloo", timeout=_PATIENCE)  # words only
    else:
        group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
        if ours:
            dist.barrier()  # who leaves first would break the others' connections
    finally:
        if ours:
            dist.destroy_process_group()


def _exchange(mine: Any, count: int, group: Any) -> list[Any]:
    import torch.distributed as dist

    every: list[Any] = [None] * count
    dist.all_gather_object(every, mine, group=group)
    return every


def _failures(every: Sequence[tuple[Any, str | None]]) -> Iterator[str]:
    for rank, (_, failure) in enumerate(every):
        if failure is not None:
            yield f"process {rank}: {failure}"


def _bytes(job: Job) -> int:
    return job[0].bytes + sum(planned.bytes_out for planned in job)
