"""What takes a host's function's place is called as that one is, for every host that is here."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest

from neulig_fast.compat import _patch
from neulig_fast.compat._seam import MISSING, Host, Place


@pytest.fixture(params=_patch.HOSTS)
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Host:
    """A host, without our source tree in the path: transformers would take kernels/ for a
    project of that name."""
    clear = [path for path in sys.path if not os.path.exists(path + "/kernels/_launch.py")]
    monkeypatch.setattr(sys, "path", clear)
    found: Host = importlib.import_module(_patch.HOSTS[request.param]).HOST
    try:
        version(found.distribution)
    except PackageNotFoundError:
        pytest.skip(f"{request.param} is not installed")
    return found


def form(function: Callable[..., Any]) -> list[tuple[Any, ...]]:
    """Names, in order, with kinds and defaults, where no list is the same as an empty one."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, () if p.default == [] else p.default) for p in parameters]


def replaced(host: Host) -> Iterator[tuple[str, Any, Callable[..., Any]]]:
    for seam in host.seams():
        original = Place(seam.where).get()
        if original is not MISSING and not hasattr(original, "__neulig_fast__"):
            functions = [f for f in (seam.exact, seam.accurate) if f is not None]
            assert functions, seam.where
            yield from ((seam.where, original, function) for function in functions)


def test_replacements_are_called_as_their_originals(host: Host) -> None:
    wrong = [
        f"{where}: {inspect.signature(function)}, the original {inspect.signature(original)}"
        for where, original, function in replaced(host)
        if callable(original) and form(function) != form(original)
    ]
    assert not wrong, "\n".join(wrong)
