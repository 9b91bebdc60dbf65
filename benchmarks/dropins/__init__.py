"""What bench_dropin times, a file per host, named as ``nf.patch`` names it.

Each has ``CASES``, a sequence of :class:`Case`, and imports its host inside its functions.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

TOY = "toy"  # the size of --quick and of the tests


class Case(NamedTuple):
    """One call of one function of a host, at one size.

    Attributes:
        seam: what is replaced, as a :class:`neulig_fast.compat._seam.Seam` says where.
        size: how large it is, in a word or two; :data:`TOY` for what tests run. Each seam has one.
        host: as given to ``nf.patch``.
        make: builds the inputs, the same ones in every call, and returns the call to be timed. It
            is called once without the patch and once under each parity, and so is what it returns:
            the replaced function must be looked up in either, not before. The call returns a
            tensor, or a list, tuple or dictionary of tensors. Its first result is checked; one
            that works in place may go on from there.
        check: ``check(result, expected)`` raises AssertionError for a result that does not agree
            with the host's. None: the tolerance rule on every tensor, with the host's as oracle.
        terms: of the sums in a result, for the tolerance rule.
    """

    seam: str
    size: str
    host: str
    make: Callable[[], Callable[[], Any]]
    check: Callable[[Any, Any], None] | None = None
    terms: int = 1


def hosts() -> list[str]:
    """All hosts with a file here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))
