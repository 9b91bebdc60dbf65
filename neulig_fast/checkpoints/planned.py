"""What will be done with one tensor of a merge."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, NamedTuple

from ..methods import BLOCK, Task
from .headers import Entry
from .layout import Output


class Known(NamedTuple):
    """What a method has measured of a model.

    Attributes:
        found: what ``measure`` returned.
        place: of the tensor's first element in the model.
    """

    found: Any
    place: int


class Planned(NamedTuple):
    """One tensor of the result.

    Attributes:
        task: what the method does; None where the first source is taken as it is.
        sources: where it is read from: the experts', then the base's, then what is beside them.
        dtype: in memory, such that no input is rounded.
        output: its name, dtype and shape in the result.
        known: what was measured of the whole model, where the method's scope is that.
        beside: what is written besides, into a file of its own.
        piece: of how many elements of each row the method's formulas hold numbers at once.
    """

    task: Task | None
    sources: tuple[Entry, ...]
    dtype: str
    output: Output
    known: Known | None = None
    beside: tuple[Output, ...] = ()
    piece: int = 0

    @property
    def grain(self) -> int:
        """Tiles are multiples of so many elements, but for the last."""
        return self.piece or BLOCK

    @property
    def bytes(self) -> int:
        """To be read, once."""
        return sum(source.bytes for source in self.sources)

    @property
    def bytes_out(self) -> int:
        """To be written."""
        return sum(output.bytes for output in (self.output, *self.beside))

    def is_in(self, written: Container[str]) -> bool:
        """Whether nothing of it is missing."""
        return all(output.name in written for output in (self.output, *self.beside))
