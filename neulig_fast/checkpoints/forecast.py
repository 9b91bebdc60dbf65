"""What a merge would do, from headers and rates measured in a second: ``--dry-run``."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..methods import BLOCK, Method, Statistic, Task, Tile
from . import dtypes, sizes
from .disk import nearest
from .measured import answer, applied
from .pipeline import Job, merged_alone
from .plan import Plan
from .planned import Planned
from .read import Reader
from .resources import OVERHEAD, Resources
from .whole import measured
from .workspace import device_elements, tile_elements

_SECONDS = 0.3  # for each rate
_PIECE = 16 << 20  # bytes


class Forecast(NamedTuple):
    """What is to be done and what will bound it.

    Attributes:
        bytes_in, bytes_out: to read, each once or in all passes over a whole model, and to write,
            of all results.
        bytes_again: to read besides, of tensors that do not fit into memory at once; at most.
        outputs: how many results there are.
        passes: over the whole model; 1 where nothing is looked for in it first.
        peak: bytes of memory, above those of ``import torch``.
        read, write, merge: bytes a second, of inputs or, for ``write``, of the result.
        seconds: predicted, of reading, merging and writing one after the other; start-up and checks
            come on top.
        bound: what takes most of them.
        warnings: what is worth knowing, in words.
    """

    bytes_in: int
    bytes_out: int
    bytes_again: int
    outputs: int
    peak: int
    read: float
    write: float
    merge: float
    seconds: float
    bound: str
    passes: int = 1
    warnings: tuple[str, ...] = ()

    @property
    def disk(self) -> float:
        """Bytes a second, read and written together, if nothing but the disk took time."""
        total = self.bytes_in + self.bytes_out
        return total / max(self.bytes_in / self.read + self.bytes_out / self.write, 1e-9)

    def __str__(self) -> str:
        rates = f"read {_rate(self.read)}, write {_rate(self.write)}, merge {_rate(self.merge)}"
        again = f" (the whole model {self.passes} times)" if self.passes > 1 else " in one pass"
        if self.bytes_again:
            size = sizes.text(self.bytes_again)
            again = f" and up to {size} again, of tensors that do not fit into memory at once"
        each = ""
        if self.outputs > 1:
            size = sizes.text(self.bytes_out // self.outputs)
            each = f" ({self.outputs} results of {size})"
        return "".join(f"warning: {text}\n" for text in self.warnings) + (
            f"reads {sizes.text(self.bytes_in)}{again}; "
            f"writes {sizes.text(self.bytes_out)}{each}\n"
            f"memory: at most {sizes.text(self.peak)}\n"
            f"rates measured just now: {rates}\n"
            f"about {self.seconds:.2g} s besides start-up and checks, bound by {self.bound}"
        )


def forecast(plans: Sequence[Plan], folder: Path, resources: Resources) -> Forecast:
    """Measure rates of the disk and of merging, and predict from them.

    Args:
        plans: of all results, which have their inputs in common.
        folder: of the result; a temporary file is written beside it.
    """
    plan = plans[0]
    read = _read_rate(plan)
    write = _write_rate(folder)
    merge = _merge_rate(plans, resources) * resources.threads
    looks, bytes_in, again = passes(plans), plan.bytes_in, 0
    if plan.whole is None:
        again = looks * _beyond(plan, resources)
    else:
        bytes_in += looks * plan.whole.bytes
    bytes_out = sum(plan.layout.bytes for plan in plans)
    needed = {
        "the disk": (bytes_in + again) / read + bytes_out / write,
        f"{plan.method.name} on {resources.threads} threads": (bytes_in + again) / merge,
    }
    bound = max(needed, key=lambda name: needed[name])
    peak = resources.memory + OVERHEAD
    return Forecast(
        bytes_in,
        bytes_out,
        again,
        len(plans),
        peak,
        read,
        write,
        merge,
        sum(needed.values()),
        bound,
        passes=1 if plan.whole is None else 1 + looks,
    )


def _beyond(plan: Plan, resources: Resources) -> int:
    """Bytes of the inputs of merged tensors that a thread does not hold at once, or its GPU."""
    share = resources.device_share

    def fits(tensor: Planned) -> bool:
        elements = tensor.output.elements
        here = tile_elements(tensor, resources.share) >= elements
        return here and (share is None or device_elements(tensor, share) >= elements)

    merged = (tensor for tensor in plan.tensors if tensor.task is not None)
    return sum(tensor.bytes for tensor in merged if not fits(tensor))


def passes(plans: Sequence[Plan]) -> int:
    """How often a method looks at the model, or where its scope is tensors at one that does not fit
    into memory, before it merges: what it asks of random numbers in their place."""
    job = next((job for job in _jobs(plans) if job[0].task is not None), None)
    if job is None:
        return 0
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(len(job[0].sources), BLOCK, generator=draw)
    tile = Tile(rows.to(dtypes.as_torch(job[0].dtype)), 0)
    side, method, count = 1 << BLOCK.bit_length() // 2, plans[0].method, 0

    def small(task: Task) -> Task:
        return replace(task, shape=(BLOCK // side, side))

    def look(statistics: Sequence[Statistic]) -> list[Any]:
        nonlocal count
        count += any(statistic.starts is None for statistic in statistics)
        return [answer(statistic, tile) for statistic in statistics]

    wholes = [small(plan.whole.task) for plan in plans if plan.whole is not None]
    if wholes:
        measured(method, wholes, look)
    else:
        own = [each._replace(task=small(each.task)) for each in job if each.task is not None]
        applied(method, own, lambda s: None if s.over == "whole" else look([s])[0])
    return count


def _jobs(plans: Sequence[Plan]) -> list[Job]:
    return list(zip(*(plan.tensors for plan in plans), strict=True))


def _rate(bytes_: float) -> str:
    return f"{sizes.text(round(bytes_))}/s"


def _measured(step: Callable[[], int]) -> float:
    """Bytes a second of something that is done again and again."""
    started, done = time.perf_counter(), step()
    while time.perf_counter() - started < _SECONDS:
        done += step()
    return done / (time.perf_counter() - started)


def _read_rate(plan: Plan) -> float:
    """Of pieces all over the inputs: what lies in the system's cache is read as from there."""
    sources = [source for tensor in plan.tensors for source in tensor.sources]
    entries = [part._replace(update=None) for source in sources for part in source.parts]
    elements = _PIECE // 8
    buffers: dict[str, torch.Tensor] = {}
    at = 0

    def step() -> int:
        nonlocal at
        entry = entries[at % len(entries)]
        at += max(len(entries) // 61, 1)
        dtype = dtypes.as_torch(entry.dtype)
        buffer = buffers.setdefault(entry.dtype, torch.empty(elements, dtype=dtype))
        part = buffer[: min(entry.elements, elements)]
        reader.read(entry, 0, part)
        return max(part.nbytes, 1)

    with Reader() as reader:
        return _measured(step)


def _write_rate(folder: Path) -> float:
    data = bytes(_PIECE)
    with tempfile.TemporaryFile(dir=nearest(folder)) as file:

        def step() -> int:
            """Where nothing was before: the system has new memory to find for it."""
            written = os.write(file.fileno(), data)
            os.fdatasync(file.fileno())
            return written

        return _measured(step)


def _merge_rate(plans: Sequence[Plan], resources: Resources) -> float:
    """Of inputs that one thread merges into all results, on random numbers in the place of the
    largest tensor's."""
    merged = [job for job in _jobs(plans) if job[0].task is not None]
    if not merged:
        return float("inf")
    largest = max(merged, key=lambda job: job[0].output.elements)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured(_merging(plans[0].method, largest, resources))
    finally:
        torch.set_num_threads(before)


def _merging(method: Method, job: Job, resources: Resources) -> Callable[[], int]:
    tensor = job[0]
    elements = min(tensor.output.elements, 16 * BLOCK)
    dtype = dtypes.as_torch(tensor.dtype)
    rows = torch.randn(len(tensor.sources), elements, device=resources.devices[0]).to(dtype)
    out = rows.new_empty(elements, dtype=dtypes.as_torch(tensor.output.dtype))

    def step() -> int:
        merged_alone(method, job, rows, out)
        if rows.is_cuda:
            torch.cuda.synchronize(rows.device)
        return max(rows.nbytes, 1)

    step()  # kernels are loaded or compiled
    return step
