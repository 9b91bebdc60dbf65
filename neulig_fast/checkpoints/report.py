"""What a merge says of itself when it has ended, and while it runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import sizes
from .forecast import Forecast


class OutputReport(NamedTuple):
    """One of several results.

    Attributes:
        folder: of the result.
        tensors: of it.
        resumed: of them, those that an interrupted run had already written.
    """

    folder: Path
    tensors: int
    resumed: int

    def __str__(self) -> str:
        count = f"all {self.resumed}" if self.resumed == self.tensors else f"{self.resumed}"
        again = f", {count} of them from an interrupted run" if self.resumed else ""
        return f"{self.folder}: {self.tensors} tensors{again}"


class MergeReport(NamedTuple):
    """How a merge went.

    Attributes:
        folder: of the result, or the one above those of several results.
        seconds: from the first check to the last file in its place.
        bytes_in, bytes_out: read and written in this run.
        tensors: of the result, or of all.
        resumed: of them, those that an interrupted run had already written.
        warnings: what is worth knowing, in words.
        outputs: by name, if the recipe asks for several results: each one's folder, tensors and
            resumed; else empty.
    """

    folder: Path
    seconds: float
    bytes_in: int
    bytes_out: int
    tensors: int
    resumed: int
    warnings: tuple[str, ...]
    outputs: Mapping[str, OutputReport]

    def __str__(self) -> str:
        rate = (self.bytes_in + self.bytes_out) / max(self.seconds, 1e-9)
        one = OutputReport(self.folder, self.tensors, self.resumed)
        return "\n".join(
            [
                *(f"warning: {text}" for text in self.warnings),
                *map(str, self.outputs.values() or [one]),
                f"{sizes.text(self.bytes_in)} read, {sizes.text(self.bytes_out)} written in "
                f"{self.seconds:.1f} s: {sizes.text(round(rate))}/s",
            ]
        )


def progress_text(done: int, total: int, seconds: float, foreseen: Forecast | None) -> str:
    """Bytes done and left, their rate beside what the disk can do, what bounds them, time left.

    Args:
        done, total: bytes, read and written.
        seconds: that ``done`` has taken.
        foreseen: if rates were measured.
    """
    parts = [f"{100 * done // max(total, 1)} % of {sizes.text(total)}"]
    if done and seconds > 0:
        rate = done / seconds
        speed = f"{sizes.text(round(rate))}/s"
        if foreseen is not None:
            share = f"{100 * rate / foreseen.disk:.0f} % of the disk's speed"
            speed += f", {share}, bound by {foreseen.bound}"
        left = f"{sizes.text(total - done)} and {_duration((total - done) / rate)} left"
        parts += [speed, left]
    return "; ".join(parts)


def _duration(seconds: float) -> str:
    """``7 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Progress:
    """Hears of a merge, and says it in words.

    Args:
        show: told of bytes done, of all bytes, and of the words for it.
    """

    def __init__(self, show: Callable[[int, int, str], Any]) -> None:
        self._show = show
        self._foreseen: Forecast | None = None
        self._started = time.monotonic()

    def foreseen(self, forecast: Forecast) -> None:
        """Rates were measured, and the work begins."""
        self._foreseen, self._started = forecast, time.monotonic()

    def advance(self, done: int, total: int) -> None:
        """So many bytes are done."""
        seconds = time.monotonic() - self._started
        self._show(done, total, progress_text(done, total, seconds, self._foreseen))


@contextlib.contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Progress | None]:
    """A bar on stderr with what :func:`progress_text` says; None if it is to be quiet."""
    if quiet:
        yield None
        return
    from rich import progress
    from rich.console import Console

    columns = (progress.BarColumn(), progress.TextColumn("{task.description}", markup=False))
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("merging", total=None)
        yield Progress(
            lambda done, total, text: bar.update(
                task, completed=done, total=total, description=text
            )
        )
