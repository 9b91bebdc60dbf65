"""``nf.patch``: fused functions in the place of another project's, counted and undone."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any

from packaging.version import Version

from .._checks import did_you_mean, raise_all
from .._registry import NeuligFastWarning
from ._seam import MISSING, Counts, Host, Place, Replacement, Seam, importers

# Name -> the module with its HOST, imported when it is asked for.
HOSTS: dict[str, str] = {
    "fusion_bench": "neulig_fast.compat.fusion_bench",
    "mergekit": "neulig_fast.compat.mergekit",
    "peft": "neulig_fast.compat.peft",
    "sd_mecha": "neulig_fast.compat._sd_mecha",
    "torch_swa": "neulig_fast.compat.torch_swa",
}
_PARITIES = ("exact", "accurate")


class Patch:
    """What :func:`neulig_fast.patch` put in place; a context manager that undoes it at the end.

    Attributes:
        name: of the host.
        parity: as asked for.
        seams: what was replaced, as ``module:function``; empty where the host's version is one
            that nothing is known of.
    """

    def __init__(self, name: str, parity: str, replaced: Mapping[Place, Replacement]) -> None:
        self.name, self.parity = name, parity
        self.seams = tuple(place.where for place in replaced)
        self._replaced = dict(replaced)

    def stats(self) -> dict[str, Counts]:
        """For each seam: calls taken, and calls that the original got, by the reason."""
        return {place.where: found.counts() for place, found in self._replaced.items()}

    def undo(self) -> None:
        """Put the originals back, everywhere; what somebody else put there since is left alone,
        with a warning. A second call does nothing."""
        with patch.lock:
            if patch.active.get(self.name) is not self:
                return
            del patch.active[self.name]
            swapped = [f for f in self._replaced.values() if f.original is not MISSING]
            kept = []
            for place, found in self._replaced.items():
                if place.get() is found.function:
                    place.put(found.original)
                else:
                    kept.append(place.where)
            _swap({id(f.function): f.original for f in swapped})
        for where in kept:  # a warning may be an error: all is done by now
            text = f"patch: {where} was replaced since by something else, which stays"
            warnings.warn(text, NeuligFastWarning, stacklevel=2)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<patch of {self.name}, {self.parity}: {len(self.seams)} seams>"


class _Patcher:
    """The function ``patch``, which knows what is active."""

    def __init__(self) -> None:
        self.active: dict[str, Patch] = {}
        # What is replaced is seen, checked and replaced by one thread; modules that are imported
        # meanwhile may ask for patch themselves.
        self.lock = threading.RLock()

    def __call__(self, name: str, parity: str = "accurate") -> Patch:
        """Replace slow functions of another project by fused ones.

        They are replaced by identity in every module that is loaded; modules that are loaded later
        import them from where they are defined, and get the fused ones too. Calls that a fused
        function does not take (sparse, meta, complex or integer tensors, a gradient where there is
        none) go to the original, and are counted.

        Args:
            name: of the project: mergekit, fusion_bench, peft, torch_swa, sd_mecha.
            parity: ``exact``: the same results, bit for bit where the original's are determined
                (functions for which there is no such replacement stay as they are). ``accurate``:
                the same maths, summed in fp32 and rounded once.

        Returns:
            A handle: ``undo()``, ``stats()``; also a context manager.

        Raises:
            ValueError: an unknown name or parity; a project that is patched already, by this
                package or by something else.
            ImportError: it is not installed.

        Warns:
            NeuligFastWarning: of a version that this was not tested with; nothing is replaced.
        """
        host = _host(name, parity)
        with self.lock:
            if name in self.active:
                active = self.active[name]
                raise ValueError(f"patch: {name} is patched already: undo {active!r} first")
            seams = host.seams() if _tested(host) else ()
            replaced = _replacements(seams, parity)
            for place, found in replaced.items():
                place.put(found.function)
            _swap({id(f.original): f.function for p, f in replaced.items() if p.shared})
            self.active[name] = Patch(name, parity, replaced)
            return self.active[name]

    def status(self) -> tuple[Patch, ...]:
        """What is active."""
        with self.lock:
            return tuple(self.active.values())


patch = _Patcher()


def _host(name: str, parity: str) -> Host:
    faults = []
    if name not in HOSTS:
        known = ", ".join(HOSTS)
        faults.append(f"name must be one of {known}, got {name!r}{did_you_mean(name, HOSTS)}")
    if parity not in _PARITIES:
        hint = did_you_mean(str(parity), _PARITIES)
        faults.append(f"parity must be exact or accurate, got {parity!r}{hint}")
    raise_all("patch", faults)
    host: Host = import_module(HOSTS[name]).HOST
    return host


def _tested(host: Host) -> bool:
    """Whether the host's version is one that is known.

    Raises:
        ImportError: it is not installed.
    """
    try:
        found = version(host.distribution)
    except PackageNotFoundError:
        text = f"patch: {host.name} is not installed: pip install {host.distribution}"
        raise ImportError(text) from None
    if host.versions.contains(Version(found).base_version):
        return True
    text = f"patch: {host.name} {found} is not one of {host.versions}: nothing is replaced"
    warnings.warn(text, NeuligFastWarning, stacklevel=3)
    return False


def _replacements(seams: Iterable[Seam], parity: str) -> dict[Place, Replacement]:
    """What goes where, if all is as the host made it."""
    faults: list[str] = []
    replaced = {}
    for seam in seams:
        fast = seam.replacement(parity)
        if fast is None:
            continue
        place = Place(seam.where)
        original = place.get()
        faults += _faults(place, original)
        replaced[place] = Replacement(seam.where, original, fast)
    raise_all("patch", faults)
    return replaced


def _faults(place: Place, original: Any) -> Iterator[str]:
    """What is wrong with what is found in a place: somebody else may have put it there."""
    if place.key is not None:  # a table's entries have any names
        return
    if original is MISSING:
        yield f"{place.where} is missing"
    elif hasattr(original, "__neulig_fast__"):
        yield f"{place.where} is neulig_fast's already"
    elif original.__module__ != place.module or (
        place.names and original.__qualname__ != place.path
    ):
        owner = f"{original.__module__}.{original.__qualname__}"
        yield f"{place.where} is {owner} already: undo that first"


def _swap(functions: Mapping[int, Any]) -> None:
    """In every loaded module, one function for another, by its ``id``."""
    for names, name, value in importers(functions):
        names[name] = functions[id(value)]
