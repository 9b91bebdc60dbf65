"""What a merge may use: threads, memory, a device; and whether that is enough."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from .. import config_files
from .._checks import raise_all
from . import sizes
from .plan import Planned
from .workspace import least_bytes

Size = int | str
OVERHEAD = 64 << 20  # bytes of the ceiling for everything but buffers


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

    @property
    def share(self) -> int:
        """Bytes of buffers of a thread."""
        return self.memory // self.threads


def asked_for(max_ram: Size, device: str, threads: int | None) -> Resources:
    """Resources from the arguments of a merge.

    Raises:
        ValueError: all that is wrong with them.
    """
    memory = sizes.parse("max_ram", max_ram)
    faults = []
    if memory < 2 * OVERHEAD:
        faults.append(f"max_ram must be at least {sizes.text(2 * OVERHEAD)}, got {max_ram!r}")
    if threads is not None and threads < 1:
        faults.append(f"threads must be 1 or more, got {threads}")
    raise_all("merge", faults)
    found = torch.device(config_files.usable_device(device))
    return Resources(threads or torch.get_num_threads(), memory - OVERHEAD, found)


def check_memory(tensors: Iterable[Planned], resources: Resources) -> None:
    """Whether every thread has room for a tile of every tensor.

    Raises:
        ValueError: the tensor that needs most, and what would be enough for it.
    """
    most = max(tensors, key=least_bytes, default=None)
    needed = 0 if most is None else least_bytes(most)
    if most is None or needed <= resources.share:
        return
    fewer = resources.memory // needed
    enough = -(-(needed * resources.threads + OVERHEAD) >> 20)
    raise ValueError(
        f"merge: {most.output.name!r} needs {sizes.text(needed)} of memory in a thread, "
        f"max_ram leaves {sizes.text(resources.share)} to each of {resources.threads}: "
        + (f"threads must be at most {fewer}, or " if fewer else "")
        + f"max_ram at least {enough}M"
    )
