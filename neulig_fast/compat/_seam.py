"""What is replaced in another project: its seams, and where they are."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

from packaging.specifiers import SpecifierSet

MISSING = object()  # in a place that is empty


class Unsupported(Exception):
    """Raised by a replacement, before it has changed anything: why it does not take a call."""


class Seam(NamedTuple):
    """One function of a host, or one entry of a table of its, and what it is replaced by.

    Attributes:
        where: ``package.module:function``, ``package.module:Class.method``,
            ``package.module:object.attribute`` or ``package.module:TABLE[key]``.
        exact: the same results, bit for bit where the original's are determined; None where there
            is none, and the original stays.
        accurate: the same maths, summed in fp32 and rounded once; None as for ``exact``.

    A replacement takes the original's arguments, and raises :class:`Unsupported` for those that
    it leaves to it. What is put into a table that lacks the key is added, and taken out by undo.
    """

    where: str
    exact: Callable[..., Any] | None
    accurate: Callable[..., Any] | None

    def replacement(self, parity: str) -> Callable[..., Any] | None:
        """The one for ``parity``."""
        return self.exact if parity == "exact" else self.accurate


class Host(NamedTuple):
    """Another project.

    Attributes:
        name: as given to ``patch``.
        distribution: as pip knows it.
        versions: that this was tested with.
        seams: all of them; called once the host is known to be there.
    """

    name: str
    distribution: str
    versions: SpecifierSet
    seams: Callable[[], Sequence[Seam]]


class Counts(NamedTuple):
    """Of one seam: calls that the replacement took, and those that it left to the original, by
    the reason."""

    taken: int
    passed: Mapping[str, int]


class Replacement:
    """A replacement in front of its original, and what became of the calls."""

    def __init__(self, where: str, original: Any, fast: Callable[..., Any]) -> None:
        self.where, self.original = where, original
        self._lock = threading.Lock()  # hosts call from several threads
        self._taken, self._passed = 0, Counter[str]()
        self.function = self._wrapped(fast) if callable(original) else fast

    def counts(self) -> Counts:
        """So far."""
        with self._lock:
            return Counts(self._taken, dict(self._passed))

    def _wrapped(self, fast: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(self.original)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                result = fast(*args, **kwargs)
            except Unsupported as why:
                reason = str(why)
            else:
                with self._lock:
                    self._taken += 1
                return result
            # Here the exception is gone, and with it what the frames of ``fast`` held in memory.
            with self._lock:
                self._passed[reason] += 1
            return self.original(*args, **kwargs)

        call.__neulig_fast__ = self  # type: ignore[attr-defined]
        return call


class Place:
    """Where a seam's function is: an attribute, or an entry of a table."""

    def __init__(self, where: str) -> None:
        module, path = where.split(":")
        owner: Any = importlib.import_module(module)
        self.key: str | None = None
        if path.endswith("]"):
            path, self.key = path[:-1].split("[")
            parents = path.split(".")
        else:
            *parents, self._name = path.split(".")
        self._owner = functools.reduce(getattr, parents, owner)
        self.where, self.module, self.path = where, module, path

    @property
    def shared(self) -> bool:
        """Whether other modules may have imported it by name."""
        return self.key is None and "." not in self.path

    @property
    def names(self) -> bool:
        """Whether a function is here under the name that it was defined with."""
        return self.key is None and isinstance(self._owner, type | ModuleType)

    def get(self) -> Any:
        """What is there now, or MISSING."""
        if self.key is not None:
            return self._owner.get(self.key, MISSING)
        return vars(self._owner).get(self._name, MISSING)

    def put(self, value: Any) -> None:
        """MISSING takes it out."""
        if self.key is None:
            setattr(self._owner, self._name, value)
        elif value is MISSING:
            del self._owner[self.key]
        else:
            self._owner[self.key] = value


def importers(functions: Mapping[int, Any]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """All loaded modules' names for some functions, by ``id``: dictionary, name, function."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        if not isinstance(names, dict):
            continue
        for name, value in list(names.items()):
            if id(value) in functions:
                yield names, name, value
