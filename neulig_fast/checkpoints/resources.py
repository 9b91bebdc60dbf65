"""What a merge may use: threads, memory, devices; and whether that is enough."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from .._checks import raise_all, usable_device
from .._registry import OPS
from . import sizes
from .plan import Planned
from .workspace import beside_bytes, least_bytes, least_device_bytes

Size = int | str
OVERHEAD = 64 << 20  # bytes of the ceiling for everything but threads
_PLANNED = 1 << 14  # tensors of models whose plan is in the overhead
_PLAN = 1536  # bytes of the plan of every other
THREAD = 1 << 20  # bytes of a thread besides buffers and formulas: its stack, its small objects
_OPS = ("magnitude_select", "magnitude_histogram", "magnitude_sums", "merge_task_vectors", "gram")
_CPU = torch.device("cpu")


class Resources(NamedTuple):
    """What a merge may use.

    Attributes:
        threads: that read, merge and write.
        memory: bytes of all threads, and of the plan.
        devices: where tiles are merged, no more than threads.
        vram: bytes on each device, of all its threads; None where devices are not GPUs.
        beside: bytes of a thread besides its buffers.
        plan: bytes of the plan, of models of many tensors.
    """

    threads: int
    memory: int
    devices: tuple[torch.device, ...] = (_CPU,)
    vram: int | None = None
    beside: int = 0
    plan: int = 0

    @property
    def share(self) -> int:
        """Bytes of buffers of a thread."""
        return max((self.memory - self.plan) // self.threads - self.beside, 0)

    @property
    def device_share(self) -> int | None:
        """Bytes of a thread's tiles on its device: half of what it may take there. The other half
        is what methods compute from them."""
        if self.vram is None:
            return None
        return self.vram // (2 * -(-self.threads // len(self.devices)))

    def device(self, worker: int) -> torch.device:
        """Of a thread, by its number: dealt round."""
        return self.devices[worker % len(self.devices)]


def asked_for(
    max_ram: Size, device: str, threads: int | None, max_vram: Size | None = None
) -> Resources:
    """Resources from the arguments of a merge.

    Raises:
        ValueError: all that is wrong with them.
    """
    memory = sizes.parse("max_ram", max_ram)
    faults = []
    if memory < 2 * OVERHEAD:
        faults.append(f"max_ram must be at least {sizes.text(2 * OVERHEAD)}, got {max_ram!r}")
    if threads is not None and (type(threads) is not int or threads < 1):
        faults.append(f"threads must be 1 or more, got {threads!r}")
    if not isinstance(device, str):
        faults.append(f"device must be text such as auto, cpu or cuda:0, got {device!r}")
    raise_all("merge", faults)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [_usable(name) for name in device_names(device, gpus, threads)]
    devices = tuple(torch.device(name) for name in names)
    count = threads or max(torch.get_num_threads(), len(devices))
    if devices[0].type != "cuda":
        if max_vram is not None:
            raise ValueError(f"merge: max_vram is of GPUs, the device is {devices[0]}")
        return Resources(count, memory - OVERHEAD, devices)
    free = {str(device): torch.cuda.mem_get_info(device)[0] for device in devices}
    asked = None if max_vram is None else sizes.parse("max_vram", max_vram)
    return Resources(count, memory - OVERHEAD, devices, vram_of(asked, free))


def notes(resources: Resources) -> Iterator[str]:
    """What is worth knowing of them, in words."""
    asked = resources.memory + OVERHEAD
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if asked > there:
        yield f"max_ram is {sizes.text(asked)}, this machine has {sizes.text(there)}"


def _usable(name: str) -> str:
    try:
        return usable_device(name)
    except ValueError as error:
        raise ValueError(f"merge: device: {error}") from error


def device_names(asked: str, gpus: int, threads: int | None = None) -> list[str]:
    """Devices by name: all GPUs for ``cuda``, as far as there are threads for them.

    Args:
        asked: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, or GPUs such as ``cuda:0,cuda:2``.
        gpus: how many there are.

    Raises:
        ValueError: a list that is not of different GPUs, or of more than threads; all faults.
    """
    names = [name.strip() for name in asked.split(",")]
    if len(names) == 1:
        every = [f"cuda:{number}" for number in range(gpus)][:threads]
        return every if asked in ("auto", "cuda") and every else [asked]
    faults = []
    if len(set(names)) < len(names) or not all(name.startswith("cuda:") for name in names):
        faults.append(f"device must list different GPUs, as cuda:0,cuda:1, got {asked!r}")
    if threads is not None and threads < len(names):
        faults.append(f"device lists {len(names)} GPUs, each needs a thread: threads is {threads}")
    raise_all("merge", faults)
    return names


def vram_of(asked: int | None, free: dict[str, int]) -> int:
    """Bytes that may be taken on each GPU: what was asked for, or four fifths of what is free.

    Raises:
        ValueError: GPUs that have less; all of them.
    """
    if asked is None:
        return min(free.values()) * 4 // 5
    short = {name: size for name, size in free.items() if size < asked}
    what = f"max_vram is {sizes.text(asked)}"
    raise_all("merge", [f"{what}, {name} has {sizes.text(n)} free" for name, n in short.items()])
    return asked


@contextlib.contextmanager
def capped(resources: Resources) -> Iterator[None]:
    """PyTorch takes no more on the GPUs than what it has now and what the merge may take: more is
    an error of its allocator."""
    before = []
    for device in resources.devices if resources.vram is not None else ():
        total = torch.cuda.get_device_properties(device).total_memory
        before.append((device, torch.cuda.get_per_process_memory_fraction(device)))
        most = torch.cuda.memory_reserved(device) + (resources.vram or 0)
        torch.cuda.set_per_process_memory_fraction(min(most / total, 1.0), device)
    try:
        yield
    finally:
        for device, fraction in before:
            torch.cuda.set_per_process_memory_fraction(fraction, device)


def in_pytorch(device: torch.device) -> bool:
    """Whether ops are formulas in PyTorch on a device, which take memory beside a tile."""
    ops = [OPS[name] for name in _OPS if device.type == "cpu"]
    return any(op.forced() == "torch" or op.why_not("cpu", "cpu") is not None for op in ops)


def for_tensors(tensors: Sequence[Planned], resources: Resources, fewer: bool) -> Resources:
    """The same, without what the plan takes, and a thread's stack and formulas besides its buffers.

    Args:
        fewer: whether threads may be fewer, where the memory is too little for all.
    """
    most, device = 0, resources.devices[0]
    if device.type == "cpu":
        slow = in_pytorch(device)
        most = max((beside_bytes(planned, slow) for planned in tensors), default=0)
    threads, beside = resources.threads, THREAD + most
    plan = _PLAN * max(sum(len(planned.sources) for planned in tensors) - _PLANNED, 0)
    if fewer:
        least = max(map(least_bytes, tensors), default=0) + beside
        threads = max(min(threads, (resources.memory - plan) // least), len(resources.devices))
    return resources._replace(threads=threads, beside=beside, plan=plan)


def check_memory(tensors: Iterable[Planned], resources: Resources) -> None:
    """Whether every thread has room for a tile of every tensor.

    Raises:
        ValueError: the tensor that needs most, and what would be enough for it.
    """
    every = list(tensors)
    if every:
        raise_all("merge", [*_ram_faults(every, resources), *_vram_faults(every, resources)])


def _ram_faults(tensors: Sequence[Planned], resources: Resources) -> Iterator[str]:
    most = max(tensors, key=least_bytes)
    needed = least_bytes(most)
    if needed > resources.share:
        whole = needed + resources.beside
        fewer = max(resources.memory - resources.plan, 0) // whole
        enough = -(-(whole * resources.threads + resources.plan + OVERHEAD) >> 20)
        yield (
            f"{most.output.name!r} needs {sizes.text(needed)} of memory in a thread, "
            f"max_ram leaves {sizes.text(resources.share)} to each of {resources.threads}: "
            + (f"threads must be at most {fewer}, or " if fewer else "")
            + f"max_ram at least {enough}M"
        )


def _vram_faults(tensors: Sequence[Planned], resources: Resources) -> Iterator[str]:
    share, most = resources.device_share, max(tensors, key=least_device_bytes)
    needed = least_device_bytes(most)
    if share is not None and resources.vram and needed > share:
        enough = -(-needed * (resources.vram // share) >> 20) + 1
        yield (
            f"{most.output.name!r} needs {sizes.text(needed)} for a thread's tile on a GPU, "
            f"max_vram leaves {sizes.text(share)}: fewer threads, or max_vram at least {enough}M"
        )
