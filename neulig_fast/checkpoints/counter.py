"""Bytes that are done, of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Counter:
    """Called with every few bytes that were done, from any thread; tells ``progress`` of bytes done
    and of all bytes."""

    def __init__(self, total: int, progress: Callable[[int, int], Any] | None) -> None:
        self.done, self.total, self._progress = 0, total, progress

    def __call__(self, count: int) -> None:
        self.done += count
        if self._progress is not None:
            self._progress(self.done, self.total)
