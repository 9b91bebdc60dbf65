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
from typing import NamedTuple

import torch
from torch import Tensor

from . import _checks

ALIGNMENT = 128  # bytes: where each tensor of a buffer starts

Lists = Sequence[Sequence[Tensor]]


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
            bounds = torch.zeros(len(self.positions) + 1, dtype=torch.int64)
            torch.cumsum((self.lengths + (chunk - 1)) // chunk, 0, out=bounds[1:])
            rows = torch.tensor(self.positions, dtype=torch.int64)
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
        return on_device(torch.tensor(self.positions, dtype=torch.int64), self.device)

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
    ``module.to(...)``).

    Args:
        experts: N >= 1 sequences of T tensors each: fp32, bf16, fp16 or fp64.

    Raises:
        ValueError: whatever does not fit, every tensor named by expert and position.
    """

    def __init__(self, experts: Iterable[Iterable[Tensor]]) -> None:
        lists = as_lists(experts)
        _checks.raise_all("TensorLists", list_faults(lists))
        if not has_memory(x for xs in lists for x in xs):
            raise ValueError("TensorLists: every tensor must have memory, on cpu or cuda")
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

    def __repr__(self) -> str:
        return f"TensorLists({self.num_experts} experts of {self.num_tensors} tensors)"

    @functools.cached_property
    def groups(self) -> list[Group]:
        """The tensors by dtype."""
        lengths = torch.tensor([tensor.numel() for tensor in self.lists[0]], dtype=torch.int64)
        addresses = torch.tensor([[x.data_ptr() for x in xs] for xs in self.lists]).T.contiguous()
        by_dtype: dict[torch.dtype, list[int]] = {}
        for position, dtype in enumerate(self.dtypes):
            by_dtype.setdefault(dtype, []).append(position)
        return [
            Group(dtype, some, lengths[some], addresses[some], self.flat[0].device)
            for dtype, some in by_dtype.items()
        ]

    def versions(self) -> list[int]:
        """How often each tensor was written to, as autograd counts."""
        return [tensor._version for tensor in self._versioned]

    @functools.cached_property
    def _versioned(self) -> list[Tensor]:
        return [tensor for tensor in self.flat if not tensor.is_inference()]


def on_device(table: Tensor, device: torch.device) -> Tensor:
    """A host tensor on ``device``, without waiting for what the device has to do before."""
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)


def as_lists(experts: Iterable[Iterable[Tensor]]) -> tuple[tuple[Tensor, ...], ...]:
    """Iterables as tuples; a tensor in the place of a list stays one, for list_faults to see."""
    lists = [experts] if isinstance(experts, Tensor) else experts
    return tuple(xs if isinstance(xs, Tensor) else tuple(xs) for xs in lists)


def list_faults(lists: Lists) -> list[str]:
    """What is wrong with the form of N lists of tensors, each fault by expert and position."""
    if not lists:
        return ["experts must be N >= 1 lists of tensors, got none"]
    if any(isinstance(tensors, Tensor) for tensors in lists):
        return ["experts must be lists of tensors, got a tensor for a list"]
    count = len(lists[0])
    found = [
        f"expert {i} has {len(tensors)} tensors, expert 0 has {count}"
        for i, tensors in enumerate(lists)
        if len(tensors) != count
    ]
    first = next((x for xs in lists for x in xs if isinstance(x, Tensor)), None)
    for t, tensors in enumerate(zip(*lists, strict=False)):
        found += _position_faults(t, tensors, first)
    return found


def _position_faults(t: int, tensors: Sequence[Tensor], first: Tensor | None) -> list[str]:
    alike = tensors[0]
    if first is None or not isinstance(alike, Tensor):
        return [f"expert 0, position {t}: a tensor is needed, got {type(alike).__name__}"]
    shape, dtype, device, found = alike.shape, alike.dtype, first.device, []
    if dtype not in _checks.FLOAT_DTYPES:
        found.append(f"position {t}: experts must be fp32, bf16, fp16 or fp64, got {dtype}")
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            found.append(f"expert {i}, position {t}: a tensor is needed, got {type(x).__name__}")
            continue
        if x.shape != shape:
            sizes = f"{_checks.shape(x)}, expert 0 has {_checks.shape(alike)}"
            found.append(f"expert {i}, position {t}: shape {sizes}")
        if x.dtype != dtype:
            found.append(f"expert {i}, position {t}: {x.dtype}, expert 0 has {dtype}")
        if x.device != device:
            found.append(f"expert {i}, position {t}: on {x.device}, others on {device}")
        if (reason := not_dense(x)) is not None:
            found.append(f"expert {i}, position {t}: {reason}")
    return found


def not_dense(tensor: Tensor) -> str | None:
    """Why kernels cannot read ``tensor`` as one run of elements; None when they can."""
    if tensor.layout is not torch.strided:
        return f"a {tensor.layout} tensor, not a dense one"
    if not tensor.is_contiguous():
        return f"not contiguous (strides {tuple(tensor.stride())}); make it so with .contiguous()"
    return None


def has_memory(tensors: Iterable[Tensor]) -> bool:
    """Whether kernels can be pointed to all of them: no meta or fake tensors, no wrappers."""
    plain = Tensor.__torch_dispatch__
    tensors = list(tensors)
    return all(kind.__torch_dispatch__ is plain for kind in {type(x) for x in tensors}) and (
        {x.device.type for x in tensors} <= {"cpu", "cuda"}
    )


def address_faults(lists: Lists, name: str = "expert {}") -> list[str]:
    """What is wrong with where the tensors are, which only tensors with memory can tell."""
    return [
        f"{name.format(i)}, position {t}: its address is no multiple of its element's size"
        for i, tensors in enumerate(lists)
        for t, x in enumerate(tensors)
        if x.data_ptr() % x.itemsize
    ]
