"""What a merge says of itself when it has ended, and while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import sizes


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


@contextlib.contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Callable[[int, int], Any] | None]:
    """A bar on stderr: share and rate of bytes, time left. Gives what ``merge`` tells."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        *(TextColumn("merging"), BarColumn(), DownloadColumn(binary_units=True)),
        *(TransferSpeedColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
