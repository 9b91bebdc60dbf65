"""Another project's tests under :func:`neulig_fast.patch`, for ``tools/test_hosts.sh``.

    NEULIG_FAST_PATCH=peft:exact pytest -p neulig_fast.compat.pytest_plugin ...

Several are separated by commas; the summary says what became of the calls.
"""

from __future__ import annotations

import os

import pytest

from . import Patch, patch

_SETTING = "NEULIG_FAST_PATCH"
_handles: list[Patch] = []


def pytest_configure() -> None:
    """Patch what the environment names.

    Raises:
        pytest.UsageError: it names nothing, or what cannot be patched.
    """
    asked = os.environ.get(_SETTING, "")
    if not asked:
        raise pytest.UsageError(f"{_SETTING} must name a project, as in {_SETTING}=peft:exact")
    for word in asked.split(","):
        name, _, parity = word.partition(":")
        try:
            _handles.append(patch(name, parity or "accurate"))
        except (ValueError, ImportError) as error:
            pytest_unconfigure()
            raise pytest.UsageError(f"{_SETTING}={asked}: {error}") from None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The calls of every seam that had any."""
    for handle in _handles:
        terminalreporter.section(f"{handle.name}, {handle.parity}")
        for where, (taken, passed) in handle.stats().items():
            reasons = "".join(f"; to the original {n}: {why}" for why, n in passed.items())
            if taken or passed:
                terminalreporter.write_line(f"{where}: taken {taken}{reasons}")


def pytest_unconfigure() -> None:
    """Put everything back, the last one first."""
    while _handles:
        _handles.pop().undo()
