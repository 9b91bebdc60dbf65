"""The folders that a merge writes: one, or one below another for each of several results.

Each has its own journal and goes through :class:`.write.Staging` alone. Several are published one
after the other, so a crash may find some in their places and others on the way. Which ones are
whole is noted above them, after an output has reached the disk and before its first file is moved;
the next run of the same leaves those as they are. The note is removed when all are in their places.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .._checks import raise_all
from ..state_files import write_json
from . import sizes
from .disk import locked, nearest
from .headers import INDEX, SINGLE
from .layout import Layout
from .manifest import MANIFEST, Manifest
from .write import JOURNAL, STAGING, Staging

_NOTE = "complete.json"
_OTHER_FILES = 200  # that a process may have open, besides those of the results


class State(NamedTuple):
    """What one process tells the others of the folders: attributes of :class:`Folders`, and the
    checksums of tensors that are written, by name of a folder."""

    complete: tuple[str, ...]
    warnings: tuple[str, ...]
    sums: Mapping[str, Mapping[str, str]]


class Folders:
    """The folders of a merge while it runs.

    Args:
        folder: of the result, or above those of several.
        stagings: by name of their folders below it; ``""`` is the one result of the folder itself.

    Attributes:
        complete: names of those that an interrupted run of the same has brought into their places.
        warnings: what is worth knowing, in words.
    """

    def __init__(self, folder: Path, stagings: Mapping[str, Staging]) -> None:
        self.folder, self.stagings = folder, stagings
        self.complete: tuple[str, ...] = ()
        self.warnings: tuple[str, ...] = ()
        self._several = "" not in stagings
        self._locks: dict[Path, int] = {}
        self._note = folder / STAGING / _NOTE

    def begin(self, resume: bool) -> None:
        """Create all files, or find what an interrupted run has written.

        Args:
            resume: go on with interrupted runs of the same, else begin anew.

        Raises:
            ValueError: a folder holds something else, all of them, or another process is writing
                there; nothing was begun.
            OSError: the disk is full, or a folder cannot be written.
        """
        nearest(self.folder)
        made = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._hold(self.folder)
            self._begin(resume)
        except (ValueError, OSError):
            if made:
                with contextlib.suppress(OSError):  # it is not empty
                    self.folder.rmdir()
            raise

    def _begin(self, resume: bool) -> None:
        if self._several:
            for staging in self.stagings.values():
                if staging.folder.is_dir():  # one merge alone may write into it
                    self._hold(staging.folder)
            self._look(resume)
        todo = self.todo()
        check_space(self.folder, {name: staging.layout for name, staging in todo.items()})
        for staging in todo.values():
            staging.folder.mkdir(exist_ok=True)
            self._hold(staging.folder)
            staging.begin(resume)

    def _hold(self, folder: Path) -> None:
        """No other process writes into a folder until :meth:`close`."""
        if folder not in self._locks:
            self._locks[folder] = locked(folder)

    def state(self) -> State:
        """What :meth:`begin` has found, for other processes."""
        sums = {name: staging.sums for name, staging in self.todo().items()}
        return State(self.complete, self.warnings, sums)

    def join(self, begun: State, rank: int) -> None:
        """Write into the files that another process has begun."""
        self.complete, self.warnings = begun.complete, begun.warnings
        for name, staging in self.todo().items():
            staging.join(begun.sums[name], rank)

    def todo(self) -> dict[str, Staging]:
        """Those that are not complete."""
        return {name: s for name, s in self.stagings.items() if name not in self.complete}

    def commit(self, name: str, manifest: Manifest, texts: Mapping[str, bytes]) -> None:
        """Put a finished checkpoint in the place of an old one; arguments as of `Staging.seal`."""
        self.stagings[name].seal(manifest, texts)
        self.complete = (*self.complete, name)
        self._write_note(self.complete)
        self.stagings[name].publish(manifest)

    def finish(self) -> None:
        """All are in their places."""
        self._write_note(())

    def close(self) -> None:
        """Close all files; what was written stays for the next run."""
        for staging in self.stagings.values():
            staging.close()
        while self._locks:
            os.close(self._locks.popitem()[1])

    # -- several ----------------------------------------------------------------------------------

    def _look(self, resume: bool) -> None:
        """Find what is complete; refuse what must not be mixed."""
        self._refuse_other_merges(resume)
        noted = self._noted() if resume else {}
        whole = [
            name
            for name, staging in self.stagings.items()
            if resume and (noted.get(name) == staging.identity or staging.is_sealed())
        ]
        self._write_note(whole)
        faults = []
        for staging in self.stagings.values():
            try:
                staging.look(resume)
            except ValueError as error:
                faults.append(str(error))
        raise_all("merge", faults)
        self.complete = tuple(name for name in whole if self.stagings[name].is_published())
        self._write_note(self.complete)
        for name in self.complete:
            self.stagings[name].clear()
        _check_open_files([staging.layout for staging in self.todo().values()])
        self.warnings = tuple(self._left_alone())

    def _refuse_other_merges(self, resume: bool) -> None:
        single = any((self.folder / name).exists() for name in (MANIFEST, INDEX, SINGLE))
        if single:
            raise ValueError(
                f"{self.folder}: is a checkpoint itself; several results go into folders below one "
                "that is none: name another"
            )
        if resume and (self.folder / STAGING / JOURNAL).exists():
            raise ValueError(
                f"{self.folder}: holds an interrupted merge of a single result; finish that one, "
                "or start anew with --no-resume (in Python resume=False)"
            )

    def _noted(self) -> Mapping[str, Any]:
        if not self._note.exists():
            return {}
        try:
            found = json.loads(self._note.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self._note}: no merge wrote this ({error})") from error
        if not isinstance(found, dict):
            raise ValueError(f"{self._note}: no merge wrote this")
        return found

    def _write_note(self, names: Iterable[str]) -> None:
        if not self._several:
            return
        noted = {name: self.stagings[name].identity for name in names}
        if noted:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._note, noted)
        elif self._note.parent.exists():
            shutil.rmtree(self._note.parent)

    def _left_alone(self) -> Iterable[str]:
        """Results of an earlier recipe, which this one neither asks for nor replaces."""
        below = self.folder.iterdir() if self.folder.exists() else ()
        others = sorted(
            path.name
            for path in below
            if path.name not in self.stagings
            and ((path / MANIFEST).exists() or (path / STAGING).is_dir())
        )
        if others:
            yield (
                f"{self.folder}: this recipe does not ask for {', '.join(others)}, of another "
                "merge: left as found"
            )


def check_space(folder: Path, layouts: Mapping[str, Layout]) -> None:
    """Whether the disk can take what is to be written into ``folder``, or below it, by name.

    Raises:
        OSError: it is too small; a file is in the folder's place.
    """
    place = nearest(folder)
    needed = sum(layout.bytes for layout in layouts.values())
    shards = [p for name in layouts for p in (folder / name).glob(f"{STAGING}/*.safetensors")]
    reserved = sum(path.stat().st_blocks * 512 for path in shards)
    free = shutil.disk_usage(place).free
    if free + reserved < needed:
        what = "the result has" if "" in layouts else f"{len(layouts)} results have"
        raise OSError(
            f"{folder}: {what} {sizes.text(needed)}, the disk has {sizes.text(free)} free"
        )


def _check_open_files(layouts: Sequence[Layout]) -> None:
    needed = sum(len(layout.shards) + 2 for layout in layouts)  # a journal, the folder itself
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed != resource.RLIM_INFINITY and needed + _OTHER_FILES > allowed:
        raise ValueError(
            f"merge: {len(layouts)} results have {needed} files, this process may open {allowed} "
            "in all: larger shards (shard_size), fewer results, or `ulimit -n`"
        )
