"""Elements of tensors from files, into memory that is the caller's and used again.

Reading into buffers, rather than mapping files, keeps the memory of a merge at what it asked for,
and turns a file that is cut short while it is read into an error instead of a signal.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from . import dtypes, low_rank, rows
from .headers import ITEM_BYTES, Entry

_AHEAD = 64 << 20  # bytes that the system is told of before they are wanted


class Reader:
    """Reads from the files of entries; may be used from several threads."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._files.values():
            os.close(handle)
        self._files.clear()

    def read(self, entry: Entry, start: int, into: Tensor, scratch: Tensor | None = None) -> None:
        """Elements ``start ..`` of a tensor.

        Args:
            into: (P,) contiguous on the CPU, of the entry's type or one that holds its values.
            scratch: bytes (uint8) for P elements of the entry, needed where the types differ; and
                ``entry.fixed_scratch(...)`` at least.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is shorter than its header says.
        """
        stored = dtypes.as_torch(entry.dtype)
        target = into
        if scratch is None and (stored != into.dtype or entry.is_made):
            raise ValueError("reader: needs scratch memory to convert")
        if scratch is not None and entry.rows is not None:
            rows.read(entry.rows, start, into, scratch, self.read)
            return
        if scratch is not None and stored != into.dtype:
            target = scratch[: into.numel() * stored.itemsize].view(stored)
        offset = entry.start + start * ITEM_BYTES[entry.dtype]
        self._fill(entry, offset, memoryview(target.view(torch.uint8).numpy()))
        if target is not into:
            into.copy_(target)
        if scratch is not None and entry.update is not None:
            low_rank.add(entry.update, start, into, scratch, self.read)

    def expect(self, entry: Entry) -> None:
        """Tell the system that a tensor will be read soon."""
        length = min(entry.stop - entry.start, _AHEAD)
        os.posix_fadvise(self._open(entry.file), entry.start, length, os.POSIX_FADV_WILLNEED)

    def _fill(self, entry: Entry, offset: int, memory: memoryview) -> None:
        handle = self._open(entry.file)
        done = 0
        while done < len(memory):
            got = os.preadv(handle, [memory[done:]], offset + done)
            if got == 0:
                raise ValueError(f"{entry.file}: ends within {entry.name!r}")
            done += got

    def _open(self, path: Path) -> int:
        with self._lock:
            if path not in self._files:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[path]
