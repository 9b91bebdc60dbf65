"""``nf.patch``: every name of a function replaced and put back, calls counted, bad input."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import types
import warnings
import weakref
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import pytest
import torch
from packaging.specifiers import SpecifierSet

import neulig_fast as nf
from neulig_fast.compat import _patch, pytest_plugin
from neulig_fast.compat._seam import Counts, Host, Replacement, Seam, Unsupported

SOURCE = """
TABLE = {"old": lambda x: ("old", x)}

def double(x):
    return ("double", x)

class Model:
    def run(self, x):
        return ("run", x)

def method(x):
    return ("method", x)

OBJECT = Model()
OBJECT.function = method
"""


def fast_double(x: int) -> tuple[str, int]:
    if x < 0:
        raise Unsupported("negative")
    return ("fast double", x)


def module(name: str, source: str) -> types.ModuleType:
    made = types.ModuleType(name)
    sys.modules[name] = made
    exec(source, made.__dict__)
    return made


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A project of one module, another that has its function by name, and our part for it."""
    names = ("toy_host", "toy_user", "toy_late", "toy_compat")
    made = module("toy_host", SOURCE)
    module("toy_user", "from toy_host import double as twice")
    compat = module("toy_compat", "")
    seams = (
        Seam("toy_host:double", None, fast_double),
        Seam("toy_host:Model.run", lambda self, x: ("exact run", x), lambda self, x: ("fast", x)),
        Seam("toy_host:TABLE[old]", None, lambda x: ("fast old", x)),
        Seam("toy_host:TABLE[new]", None, lambda x: ("new", x)),
    )
    compat.HOST = Host("toy", "toy-host", SpecifierSet(">=1,<2"), lambda: seams)
    monkeypatch.setitem(_patch.HOSTS, "toy", "toy_compat")
    versions = {"toy-host": "1.4"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(_patch, "version", version)
    made.versions = versions
    yield made
    for handle in nf.patch.status():
        handle.undo()
    for name in names:
        sys.modules.pop(name, None)


def test_every_name_of_a_function_is_replaced_and_put_back(host: types.ModuleType) -> None:
    double, run, old = host.double, host.Model.run, host.TABLE["old"]
    user = sys.modules["toy_user"]
    with nf.patch("toy") as handle:
        late = module("toy_late", "from toy_host import double")
        assert host.double is user.twice is late.double is not double
        assert user.twice(3) == ("fast double", 3)
        assert host.Model().run(1) == ("fast", 1)
        assert host.TABLE["old"](1) == ("fast old", 1)
        assert host.TABLE["new"](1) == ("new", 1)
        assert nf.patch.status() == (handle,)
    assert host.double is user.twice is late.double is double
    assert host.Model.run is run
    assert {"old": old} == host.TABLE
    assert nf.patch.status() == ()
    handle.undo()  # again: nothing happens


def test_threads_that_patch_at_once_patch_once(
    host: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    double, handles, found = host.double, [], _patch._replacements
    # Long enough for all to have looked at what is there.
    monkeypatch.setattr(_patch, "_replacements", lambda *args: (found(*args), time.sleep(0.05))[0])

    def work() -> None:
        with contextlib.suppress(ValueError):
            handles.append(nf.patch("toy"))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (handle,) = handles
    handle.undo()
    assert host.double is sys.modules["toy_user"].twice is double


def test_a_warning_that_is_an_error_leaves_nothing_half_undone(host: types.ModuleType) -> None:
    run, handle = host.Model.run, nf.patch("toy")
    host.double = print  # somebody else's, in the first place
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(nf.NeuligFastWarning, match="toy_host:double was replaced since"):
            handle.undo()
    assert host.double is print
    assert host.Model.run is run
    assert sys.modules["toy_user"].twice.__qualname__ == "double"
    assert not hasattr(sys.modules["toy_user"].twice, "__neulig_fast__")


def test_calls_are_counted(host: types.ModuleType) -> None:
    handle = nf.patch("toy")
    assert host.double(-1) == ("double", -1)  # the original's
    assert host.double(x=2) == ("fast double", 2)
    threads = [
        threading.Thread(target=lambda: [host.double(1) for _ in range(500)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert handle.stats()["toy_host:double"] == Counts(2001, {"negative": 1})
    assert handle.stats()["toy_host:Model.run"] == Counts(0, {})


def test_threads_may_patch_and_undo(host: types.ModuleType, monkeypatch: Any) -> None:
    """One of them at a time gets the patch; when all are done, nothing of it is left."""
    double, run, user = host.double, host.Model.run, sys.modules["toy_user"]
    swap, errors, gained = _patch._swap, [], []

    def slow_swap(functions: Any) -> None:
        time.sleep(0.001)  # others have their turn in the middle
        swap(functions)

    monkeypatch.setattr(_patch, "_swap", slow_swap)

    def work() -> None:
        for _ in range(10):
            try:
                with nf.patch("toy") as handle:
                    gained.append(user.twice(1) == ("fast double", 1) and host.double is user.twice)
                    handle.undo()
            except ValueError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(gained) and len(gained) + len(errors) == 60
    assert all("toy is patched already: undo" in error for error in errors)
    assert host.double is user.twice is double and host.Model.run is run
    assert nf.patch.status() == () and list(host.TABLE) == ["old"]


def test_what_goes_to_the_original_leaves_nothing_of_the_attempt() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def fast() -> None:
        large = torch.ones(3)
        held.append(weakref.ref(large))
        raise Unsupported("large")

    def original() -> None:
        assert held[0]() is None
        raise ValueError("the host's own")

    with pytest.raises(ValueError, match="the host's own") as error:
        Replacement("toy:original", original, fast).function()
    assert error.value.__context__ is None


def test_undo_leaves_the_importers_of_an_added_entry_alone(host: types.ModuleType) -> None:
    user = sys.modules["toy_user"]
    with nf.patch("toy"):
        user.added = host.TABLE["new"]
    assert user.added(1) == ("new", 1)


def test_exact_replaces_only_what_has_an_exact_twin(host: types.ModuleType) -> None:
    handle = nf.patch("toy", parity="exact")
    assert handle.seams == ("toy_host:Model.run",)
    assert host.Model().run(1) == ("exact run", 1)
    assert host.double(1) == ("double", 1)
    assert "new" not in host.TABLE


def test_twice_is_an_error(host: types.ModuleType) -> None:
    nf.patch("toy")
    with pytest.raises(ValueError, match=r"toy is patched already: undo <patch of toy"):
        nf.patch("toy", "exact")


def test_somebody_elses_patch_is_an_error_and_nothing_is_replaced(host: types.ModuleType) -> None:
    def other(x: int) -> int:
        return x

    run, host.double = host.Model.run, other
    with pytest.raises(ValueError, match=r"toy_host:double is \S*other already: undo"):
        nf.patch("toy")
    assert host.double is other
    assert host.Model.run is run
    assert nf.patch.status() == ()
    del host.double
    with pytest.raises(ValueError, match="toy_host:double is missing"):
        nf.patch("toy")


def test_what_somebody_puts_there_afterwards_stays(host: types.ModuleType) -> None:
    handle = nf.patch("toy")

    def other(x: int) -> int:
        return x

    host.double = other
    with pytest.warns(nf.NeuligFastWarning, match="toy_host:double was replaced since"):
        handle.undo()
    assert host.double is other
    assert sys.modules["toy_user"].twice(1) == ("double", 1)


def test_another_version_is_warned_of_and_left_alone(host: types.ModuleType) -> None:
    double = host.double
    host.versions["toy-host"] = "2.0.1"
    with pytest.warns(nf.NeuligFastWarning, match=r"toy 2\.0\.1 is not one of <2,>=1: nothing"):
        handle = nf.patch("toy")
    assert handle.seams == ()
    assert host.double is double


def test_a_missing_host_says_how_to_install_it(host: types.ModuleType) -> None:
    host.versions.clear()
    with pytest.raises(ImportError, match="toy is not installed: pip install toy-host"):
        nf.patch("toy")


def test_unknown_words(host: types.ModuleType) -> None:
    with pytest.raises(ValueError, match=r"(?s)got 'tpy'; did you mean 'toy'\?.*got 'exakt'"):
        nf.patch("tpy", parity="exakt")


def test_the_plugin_patches_what_the_environment_names(
    host: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEULIG_FAST_PATCH", "toy:exact")
    pytest_plugin.pytest_configure()
    (active,) = nf.patch.status()
    assert (active.name, active.parity) == ("toy", "exact")
    pytest_plugin.pytest_unconfigure()
    assert nf.patch.status() == ()
    for setting, text in (("", "must name a project"), ("toy,tpy", "got 'tpy'; did you mean")):
        monkeypatch.setenv("NEULIG_FAST_PATCH", setting)
        with pytest.raises(pytest.UsageError, match=text):
            pytest_plugin.pytest_configure()
        assert nf.patch.status() == ()


def test_an_attribute_of_an_object_may_have_any_name(
    host: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seam = Seam("toy_host:OBJECT.function", None, lambda x: ("fast method", x))
    made = Host("toy", "toy-host", SpecifierSet(">=1,<2"), lambda: [seam])
    monkeypatch.setattr(sys.modules["toy_compat"], "HOST", made)
    with nf.patch("toy") as patch:
        assert host.OBJECT.function(2) == ("fast method", 2)
        assert patch.stats() == {"toy_host:OBJECT.function": Counts(1, {})}
    assert host.OBJECT.function is host.method
    host.OBJECT.function = fast_double  # of another module: somebody has replaced it before
    with pytest.raises(ValueError, match=r"OBJECT\.function is .*fast_double already"):
        nf.patch("toy")
