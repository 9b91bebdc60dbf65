"""A thread's memory: one buffer, taken once, in which every tile has its place."""

from __future__ import annotations

import mmap
from typing import NamedTuple

import torch
from torch import Tensor

from .._memory import large_pages
from ..methods import BLOCK
from . import dtypes
from .headers import ITEM_BYTES
from .planned import Planned

_ALIGNMENT = 128  # bytes, of each row, as in the arena


class Views(NamedTuple):
    """Memory for P elements of a tensor.

    Attributes:
        rows: (N, P), of the experts and the base.
        out: (P,), of the result.
        scratch: bytes, for values of another type than the rows'.
    """

    rows: Tensor
    out: Tensor
    scratch: Tensor


def element_bytes(planned: Planned) -> int:
    """What one element of a tensor takes of a workspace."""
    rows = len(planned.sources) * ITEM_BYTES[planned.dtype]
    return rows + ITEM_BYTES[planned.output.dtype] + _scratch_bytes(planned)


def _scratch_bytes(planned: Planned) -> int:
    parts = [part for source in planned.sources for part in source.parts]
    others = [ITEM_BYTES[part.dtype] for part in parts if part.dtype != planned.dtype]
    return max(others, default=0)


def _fixed_bytes(planned: Planned) -> int:
    """What making sources takes of a workspace, whatever the tile."""
    item = ITEM_BYTES[planned.dtype]
    return max(source.fixed_scratch(item) for source in planned.sources)


def tile_elements(planned: Planned, memory: int) -> int:
    """How many elements fit: whole grains, but for tensors that fit as a whole.

    Raises:
        ValueError: not one grain does.
    """
    elements = max(planned.output.elements, 1)
    fits = (memory - _constant_bytes(planned)) // element_bytes(planned)
    if fits < min(planned.grain, elements):
        needed = least_bytes(planned)
        raise ValueError(f"memory of {memory} bytes: {planned.output.name!r} needs {needed}")
    return elements if fits >= elements else fits // planned.grain * planned.grain


def device_elements(planned: Planned, memory: int) -> int:
    """How many fit on a GPU: the same with its memory.

    Raises:
        ValueError: not one grain does.
    """
    elements = max(planned.output.elements, 1)
    fits = memory // _device_element_bytes(planned)
    if fits < min(planned.grain, elements):
        needed = least_device_bytes(planned)
        raise ValueError(f"GPU memory of {memory} bytes: {planned.output.name!r} needs {needed}")
    return elements if fits >= elements else fits // planned.grain * planned.grain


def least_device_bytes(planned: Planned) -> int:
    """What the smallest tile of a tensor takes on a GPU."""
    return _device_element_bytes(planned) * min(max(planned.output.elements, 1), planned.grain)


def _device_element_bytes(planned: Planned) -> int:
    """Rows and result, twice: a tile comes while the one before it is still there."""
    rows = len(planned.sources) * ITEM_BYTES[planned.dtype]
    return 2 * (rows + ITEM_BYTES[planned.output.dtype])


def least_bytes(planned: Planned) -> int:
    """What the smallest tile of a tensor takes of a workspace."""
    elements = min(max(planned.output.elements, 1), planned.grain)
    return element_bytes(planned) * elements + _constant_bytes(planned)


_ARRAYS = 20  # that formulas hold at once of a piece, and the C library after them


def beside_bytes(planned: Planned, in_pytorch: bool) -> int:
    """What formulas in PyTorch take beside a workspace.

    Args:
        in_pytorch: whether ops are such formulas too, of a block at a time.
    """
    if planned.task is None:
        return 0
    piece = max(planned.piece, BLOCK) if in_pytorch else planned.piece
    item = max(ITEM_BYTES[planned.dtype], 4)
    return _ARRAYS * item * len(planned.sources) * min(piece, planned.output.elements)


def whole_bytes(planned: Planned) -> int:
    """What a tensor takes of a workspace as a whole."""
    return element_bytes(planned) * max(planned.output.elements, 1) + _constant_bytes(planned)


def _constant_bytes(planned: Planned) -> int:
    """What a tile takes of a workspace besides its elements."""
    return _ALIGNMENT * (len(planned.sources) + 2) + _fixed_bytes(planned)


def _mapped(memory: int) -> Tensor:
    """Bytes from the system itself, which has them back at once: the C library keeps what is freed
    for a thread's next wish, and once large memory was freed takes small wishes from the like."""
    own = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # what is shared has no large pages
    return torch.frombuffer(mmap.mmap(-1, max(memory, 1), flags=own), dtype=torch.uint8)[:memory]


class Workspace:
    """Memory of one thread.

    Args:
        memory: bytes that it may have.
        needed: bytes that there is use for.
        pinned: for copies to a GPU that do not wait.

    Attributes:
        bytes: that it may have.
    """

    def __init__(self, memory: int, needed: int, pinned: bool = False) -> None:
        self.bytes, taken = memory, min(memory, needed)
        self._memory = (
            torch.empty(taken, dtype=torch.uint8, pin_memory=True)
            if pinned
            else large_pages(_mapped(taken))
        )

    def views(self, planned: Planned, elements: int) -> Views:
        """Memory for a tile, which was a tile before."""
        at = 0

        def take(bytes_: int) -> Tensor:
            nonlocal at
            view = self._memory[at : at + bytes_]
            at += -(-bytes_ // _ALIGNMENT) * _ALIGNMENT
            return view

        dtype = dtypes.as_torch(planned.dtype)
        width = -(-elements * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        rows = take(width * len(planned.sources)).view(dtype).view(len(planned.sources), -1)
        out = take(elements * ITEM_BYTES[planned.output.dtype])
        scratch = take(max(elements * _scratch_bytes(planned), _fixed_bytes(planned)))
        return Views(rows[:, :elements], out.view(dtypes.as_torch(planned.output.dtype)), scratch)
