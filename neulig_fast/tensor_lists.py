"""N lists of T tensors, and the tables of their addresses that kernels read.

A table is one int64 tensor on the tensors' device, for T tensors of one dtype and N experts::

    bounds (T + 1) | lengths (T) | rows (T) | addresses (T, N)

Tensors are cut into chunks of a fixed number of elements; ``bounds`` counts the chunks before each
tensor, so that whoever works on chunk c finds its tensor by a binary search. ``rows`` are the
tensors' positions in the lists, which are rows of (T, N) weights.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from ._list_checks import address_faults, as_lists, list_faults, memory_faults

ALIGNMENT = 128  # bytes: where each tensor of a buffer starts


class Layout(NamedTuple):
    """Where the tensors of a group are in one buffer.

    ``pieces``: the lengths it is cut into; ``kept``: which of them are tensors, not padding;
    ``starts``: the tensors' first bytes, on the device; ``width``: its length.
    """

    pieces: list[int]
    kept: list[int]
    starts: Tensor
    width: int


class Target(NamedTuple):
    """Tensors of a group, the addresses (on the device) and the dtype of the outputs they go to."""

    group: Group
    addresses: Tensor
    dtype: torch.dtype


class Group:
    """The tensors of one dtype of N lists; see :class:`TensorLists`."""

    def __init__(
        self, dtype: torch.dtype, positions: list[int], lengths: Tensor, addresses: Tensor,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.dtype, self.positions, self.device = dtype, positions, device
        self.lengths, self.addresses = lengths, addresses  # (T,) and (T, N), on the host
        self._tables: dict[int, tuple[Tensor, int]] = {}
        self._layouts: dict[int, Layout] = {}

    def table(self, chunk: int) -> tuple[Tensor, int]:
        """The table for chunks of ``chunk`` elements, and how many chunks there are."""
        if chunk not in self._tables:
            bounds = host([0] * (len(self.positions) + 1))
            torch.cumsum((self.lengths + (chunk - 1)) // chunk, 0, out=bounds[1:])
            rows = host(self.positions)
            table = torch.cat([bounds, self.lengths, rows, self.addresses.flatten()])
            self._tables[chunk] = on_device(table, self.device), int(bounds[-1])
        return self._tables[chunk]

    def layout(self, itemsize: int) -> Layout:
        """The buffer of one tensor per position, each from a boundary of 128 bytes on."""
        if itemsize not in self._layouts:
            unit = ALIGNMENT // itemsize
            room = (self.lengths + (unit - 1)) // unit * unit
            pieces: list[int] = []
            kept: list[int] = []
            for length, whole in zip(self.lengths.tolist(), room.tolist(), strict=True):
                kept.append(len(pieces))
                pieces += [length] if length == whole else [length, whole - length]
            starts = on_device((room.cumsum(0) - room) * itemsize, self.device)
            self._layouts[itemsize] = Layout(pieces, kept, starts, sum(pieces))
        return self._layouts[itemsize]

    @functools.cached_property
    def rows(self) -> Tensor:
        """The positions, on the device."""
        return on_device(host(self.positions), self.device)

    def split(self, keys: Sequence[object]) -> Iterator[tuple[Group, list[int]]]:
        """Groups of equal keys, one key per tensor, and which tensors of this group they have."""
        found: dict[object, list[int]] = {}
        for index, key in enumerate(keys):
            found.setdefault(key, []).append(index)
        if len(found) == 1:
            yield self, list(range(len(keys)))
            return
        for some in found.values():
            positions = [self.positions[i] for i in some]
            lengths, addresses = self.lengths[some], self.addresses[some]
            yield Group(self.dtype, positions, lengths, addresses, self.device), some


class TensorLists:
    """N lists of T tensors, checked once, for calls that cost microseconds on the host.

    Position t of every list has one shape and dtype; positions may differ in both, and in
    alignment. Everything is on one device and contiguous.

    It holds the tensors and remembers their memory: writing into them is seen by later calls, but
    make it anew after one got other storage (``tensor.data = ...``, ``set_``, ``resize_``,
    ``module.to(...)``). A copy of it (``copy``, ``pickle``) is made anew.

    Args:
        experts: N >= 1 sequences of T tensors each: fp32, bf16, fp16 or fp64.

    Raises:
        ValueError: whatever does not fit, every tensor named by expert and position.
    """

    def __init__(self, experts: Iterable[Iterable[Tensor]]) -> None:
        lists = as_lists(experts)
        _checks.raise_all("TensorLists", list_faults(lists))
        _checks.raise_all("TensorLists", memory_faults(lists))
        _checks.raise_all("TensorLists", address_faults(lists))
        self._keep(lists)

    @classmethod
    def of(cls, lists: tuple[tuple[Tensor, ...], ...]) -> TensorLists:
        """The same, of lists in which :func:`list_faults` and :func:`address_faults` see none."""
        made = cls.__new__(cls)
        made._keep(lists)
        return made

    def _keep(self, lists: tuple[tuple[Tensor, ...], ...]) -> None:
        self.lists = lists
        self.flat = [tensor for tensors in lists for tensor in tensors]
        self.num_experts, self.num_tensors = len(lists), len(lists[0])
        self.device = self.flat[0].device if self.flat else None
        self.shapes = [tensor.shape for tensor in lists[0]]
        self.dtypes = [tensor.dtype for tensor in lists[0]]
        # Prepared outputs that were found to fit, and how to write into them.
        self.targets: weakref.WeakKeyDictionary[TensorLists, list[Target]]
        self.targets = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[TensorLists], tuple[Any]]:
        # A copy has tensors, and so addresses, of its own.
        return TensorLists, (self.lists,)

    def __repr__(self) -> str:
        return f"TensorLists({self.num_experts} experts of {self.num_tensors} tensors)"

    @functools.cached_property
    def groups(self) -> list[Group]:
        """The tensors by dtype."""
        lengths = host([tensor.numel() for tensor in self.lists[0]])
        addresses = host([[x.data_ptr() for x in xs] for xs in self.lists]).T.contiguous()
        by_dtype: dict[torch.dtype, list[int]] = {}
        for position, dtype in enumerate(self.dtypes):
            by_dtype.setdefault(dtype, []).append(position)
        return [
            Group(dtype, some, lengths[some], addresses[some], self.flat[0].device)
            for dtype, some in by_dtype.items()
        ]

    @functools.cached_property
    def extents(self) -> list[tuple[int, int]]:
        """The first byte, and the one after the last, of all memory that is theirs, in order."""
        return merged(extents_of(self.flat))

    def versions(self) -> list[int]:
        """How often each tensor was written to, as autograd counts."""
        return [tensor._version for tensor in self._versioned]

    @functools.cached_property
    def _versioned(self) -> list[Tensor]:
        return [tensor for tensor in self.flat if not tensor.is_inference()]


def extents_of(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """The first byte, and the one after the last, of every tensor that has any, in order."""
    return sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in tensors if x.nbytes)


def merged(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes; extents that overlap have become one."""
    found: list[tuple[int, int]] = []
    for start, stop in extents:
        if found and start < found[-1][1]:
            start, stop = found[-1][0], max(stop, found.pop()[1])
        found.append((start, stop))
    return found


def host(numbers: Sequence[Any]) -> Tensor:
    """An int64 tensor on the host, whatever the default device is."""
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


def on_device(table: Tensor, device: torch.device) -> Tensor:
    """A host tensor on ``device``, there for every stream from now on.

    A table is made on one stream and may be used on any, so the host waits for the copy. It goes
    on a stream of its own: not behind the work that a stream of the caller's has yet to do.

    Raises:
        RuntimeError: while a CUDA graph is captured, whose replays would read the host's memory.
    """
    if device.type != "cuda":
        return table
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "neulig_fast: addresses cannot be sent to the device while a CUDA graph is captured; "
            "use TensorLists, also of outputs, with which the same call was made once before"
        )
    with torch.cuda.stream(_copies(device)):
        return table.to(device)


@functools.cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def held(table: Tensor) -> Tensor:
    """``table``, whose memory is not reused before the current stream is done with it."""
    if table.is_cuda:
        table.record_stream(torch.cuda.current_stream(table.device))
    return table
