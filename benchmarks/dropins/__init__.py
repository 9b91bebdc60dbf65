"""What bench_dropin times, a file per host, named as ``nf.patch`` names it.

Each has ``CASES``, a sequence of :class:`Case`, and imports its host inside its functions.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

# Where the project's root is on the path, transformers would take its kernels for a package.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]

TOY = "toy"  # the size of --quick and of the tests


class Case(NamedTuple):
    """One call of one function of a host, at one size.

    Attributes:
        seam: what is replaced, as a :class:`neulig_fast.compat._seam.Seam` says where.
        size: how large it is, in a word or two; :data:`TOY` for what tests run. Each seam has one.
        host: as given to ``nf.patch``.
        make: builds the inputs and returns the call to be timed, which looks the replaced function
            up: the same call is made without the patch and under each parity. It returns a
            tensor, or a list, tuple or dictionary of tensors.
        check: ``check(result, expected)`` raises AssertionError for a result that does not agree
            with the host's. None: the tolerance rule on every tensor, with the host's as oracle.
        terms: of the sums in a result, for the tolerance rule.
        in_place: whether a call writes into its inputs. ``make`` is then called for the host and
            under each parity, the same inputs in every call, and may look the function up itself;
            the first result is checked, later calls go on from there.
        parities: at which this call is taken: a seam may leave some calls to the original.
    """

    seam: str
    size: str
    host: str
    make: Callable[[], Callable[[], Any]]
    check: Callable[[Any, Any], None] | None = None
    terms: int = 1
    in_place: bool = False
    parities: tuple[str, ...] = ("exact", "accurate")


def hosts() -> list[str]:
    """All hosts with a file here."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))
