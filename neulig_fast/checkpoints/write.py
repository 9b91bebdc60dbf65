"""A checkpoint in the making: written beside the old one, then put in its place.

Everything goes to ``<folder>/.merging`` first: shards at their full size with headers, tensors in
any order at their places, and a journal with a line for every tensor that is complete, with the
checksum of its bytes. Whoever looks into the folder meanwhile finds the old checkpoint, or none.
When all is written and has reached the disk, the old files are removed and the new ones moved, the
file that makes them a checkpoint last: between two moves there is nothing that could be loaded.

What interrupts the process leaves the journal, from which the next run goes on. It believes no line
of it: the bytes of each tensor that is listed are read again and compared with their checksum.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from ..state_files import sync_folder, write_text
from . import journal
from .disk import Flusher, named, reserve, sync, write_all
from .headers import INDEX, SINGLE
from .layout import Layout, Place
from .manifest import MANIFEST, Manifest, checksum

STAGING, JOURNAL = ".merging", "journal.jsonl"
_CHECK_BYTES = 16 << 20


class TensorWriter:
    """Writes one tensor from its first byte to its last."""

    def __init__(self, staging: Staging, name: str, place: Place) -> None:
        self._staging, self._name, self._place = staging, name, place
        self._at = place.start
        self._sum = xxhash.xxh3_128()

    def write(self, data: memoryview) -> None:
        """The next bytes."""
        self._sum.update(data)
        self._staging.write(self._place.file, self._at, data)
        self._at += len(data)

    def finish(self) -> None:
        """All bytes have been written: the journal gets its line."""
        if self._at != self._place.stop:
            left = self._place.stop - self._at
            raise ValueError(f"{self._name}: {left} bytes were not written")
        self._staging.record(self._name, self._sum.hexdigest())


class Staging:
    """The folder of a checkpoint while it is written.

    Args:
        folder: of the finished checkpoint; created if it is missing.
        layout: of its shards.
        identity: what a run must share with an interrupted one to go on with it, as JSON.
    """

    def __init__(self, folder: Path, layout: Layout, identity: Mapping[str, Any]) -> None:
        self.folder, self.layout, self.identity = folder, layout, identity
        self.sums: dict[str, str] = {}
        self._stage = folder / STAGING
        self._handles: dict[str, int] = {}
        self._flusher: Flusher | None = None
        self._journal = -1
        self._lock = threading.Lock()

    # -- beginning --------------------------------------------------------------------------------

    def begin(self, resume: bool) -> None:
        """Create the files, or find what an interrupted run has written.

        Args:
            resume: go on with an interrupted run if there is one, else begin anew.

        Raises:
            ValueError: the folder holds files that no merge wrote; or an interrupted run of
                something else is to be resumed.
            OSError: the disk is full, or the folder cannot be written.
        """
        known = self.look(resume)
        if known is None:
            shutil.rmtree(self._stage, ignore_errors=True)
            self._stage.mkdir(parents=True)
        self._open(JOURNAL)
        for shard in self.layout.shards:
            handle = self._handles[shard.name]
            reserve(handle, shard.bytes, self._stage / shard.name)
            write_all(handle, shard.header, 0)
        if known is None:
            self._append({"merge": self.identity})
        else:
            self.sums = {name: text for name, text in known.items() if self._holds(name, text)}

    def join(self, sums: Mapping[str, str], rank: int) -> None:
        """Write into the files that another process has begun, with a journal of one's own.

        Args:
            sums: what that process has found complete.
            rank: of this process.
        """
        self.sums = dict(sums)
        self._open(f"journal-{rank}.jsonl")

    def _open(self, journal_name: str) -> None:
        create = os.O_CREAT | os.O_CLOEXEC
        for shard in self.layout.shards:
            path = self._stage / shard.name
            self._handles[shard.name] = os.open(path, os.O_RDWR | create, 0o644)
        path = self._stage / journal_name
        self._journal = os.open(path, os.O_WRONLY | os.O_APPEND | create, 0o644)
        if os.fstat(self._journal).st_size:
            write_all(self._journal, b"\n")  # a crash may have cut the last line
        self._flusher = Flusher()

    def look(self, resume: bool) -> dict[str, str] | None:
        """What an interrupted run of the same has written: checksums by tensor; None without one.

        Nothing new is begun, but a move that was interrupted is brought to its end.

        Raises:
            ValueError: as :meth:`begin`.
        """
        done = Manifest.find(self._stage)
        if done is not None:
            self.publish(done)
        self._refuse_foreign_files()
        return self._interrupted() if resume else None

    def _refuse_foreign_files(self) -> None:
        if not self.folder.exists():
            return
        manifest = Manifest.find(self.folder)
        ours = {MANIFEST, STAGING, *(manifest.files if manifest else ())}
        foreign = sorted(path.name for path in self.folder.iterdir() if path.name not in ours)
        if foreign:
            names = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
            what = "a file" if len(foreign) == 1 else f"{len(foreign)} files"
            raise ValueError(
                f"{self.folder}: holds {what} that no merge wrote ({names}), which would be mixed "
                "with the result: name another folder, or move what is there"
            )

    def _journal_lines(self) -> list[dict[str, Any]]:
        """Those of an interrupted run, its identity first; none if there was none."""
        others = sorted(self._stage.glob("journal-*.jsonl"))  # of other processes
        lines = [line for path in (self._stage / JOURNAL, *others) for line in journal.lines(path)]
        return lines if lines and "merge" in lines[0] else []

    def _interrupted(self) -> dict[str, str] | None:
        """Checksums that the journal of an interrupted run lists; None if there was none."""
        lines = self._journal_lines()
        if not lines:
            return None
        different = sorted(journal.differences(lines[0]["merge"], self.identity))
        if different:
            raise ValueError(
                f"{self.folder}: holds an interrupted merge that differs in "
                f"{', '.join(different)}; finish that one, or start anew with --no-resume (in "
                "Python resume=False)"
            )
        known = {line["tensor"]: line["xxh3"] for line in lines[1:] if "tensor" in line}
        return {name: text for name, text in known.items() if name in self.layout.places}

    def _holds(self, name: str, checksum: str) -> bool:
        place = self.layout.places[name]
        found = xxhash.xxh3_128()
        for at in range(place.start, place.stop, _CHECK_BYTES):
            length = min(_CHECK_BYTES, place.stop - at)
            found.update(os.pread(self._handles[place.file], length, at))
        return found.hexdigest() == checksum

    # -- writing ----------------------------------------------------------------------------------

    def tensor(self, name: str) -> TensorWriter:
        """Where a tensor is written to."""
        return TensorWriter(self, name, self.layout.places[name])

    def write(self, file: str, at: int, data: memoryview) -> None:
        """Bytes of a shard."""
        with named(self._stage / file):
            write_all(self._handles[file], data, at)
        if self._flusher is not None:
            self._flusher.wrote(self._handles[file], len(data))

    def record(self, name: str, checksum: str) -> None:
        """A tensor is complete."""
        with self._lock:
            self.sums[name] = checksum
            self._append({"tensor": name, "xxh3": checksum})

    def _append(self, line: Mapping[str, Any]) -> None:
        write_all(self._journal, json.dumps(line, sort_keys=True).encode() + b"\n")

    def sync(self) -> None:
        """All that was written reaches the disk.

        Raises:
            OSError: it did not.
        """
        flusher, self._flusher = self._flusher, None
        try:
            if flusher is not None:
                flusher.close()
            for handle in self._handles.values():
                os.fsync(handle)
        except OSError:
            self._forget()
            raise

    def _forget(self) -> None:
        """After a failure to sync nothing that the journal lists may be on the disk, though it can
        be read from memory: the next run begins anew."""
        if self._journal >= 0:
            os.ftruncate(self._journal, 0)

    def close(self) -> None:
        """Close all files; what was written stays for the next run."""
        flusher, self._flusher = self._flusher, None
        try:
            if flusher is not None:
                flusher.close()
        except OSError:
            self._forget()
        for handle in [*self._handles.values(), *([self._journal] if self._journal >= 0 else [])]:
            os.close(handle)
        self._handles, self._journal = {}, -1

    # -- finishing --------------------------------------------------------------------------------

    def seal(self, manifest: Manifest, texts: Mapping[str, bytes]) -> None:
        """Bring the finished checkpoint to the disk, from where :meth:`publish` cannot lose it.

        Args:
            manifest: of the new one.
            texts: small files by name, the index of shards among them.

        Raises:
            OSError: the disk is full or the like; the old checkpoint is untouched.
        """
        for name, text in texts.items():
            (self._stage / name).write_bytes(text)
            sync(self._stage / name)
        self.sync()
        sync_folder(self._stage)
        write_text(self._stage / MANIFEST, manifest.text())

    def publish(self, new: Manifest) -> None:
        """Put the sealed checkpoint in the place of the old one.

        May be interrupted anywhere and called again: the next run goes on moving. While the old
        manifest is there, nothing was moved yet; when it is gone, so are its files.
        """
        old = Manifest.find(self.folder)
        if old is not None:
            for name in (*sorted(old.files, key=_makes_whole, reverse=True), MANIFEST):
                (self.folder / name).unlink(missing_ok=True)
            sync_folder(self.folder)
        for name in (*sorted(new.files, key=_makes_whole), MANIFEST):
            if (self._stage / name).exists():
                os.replace(self._stage / name, self.folder / name)
        sync_folder(self.folder)
        self.close()
        shutil.rmtree(self._stage)

    def is_sealed(self) -> bool:
        """Whether a run of the very same was interrupted between sealing and publishing."""
        lines = self._journal_lines()
        same = bool(lines) and not list(journal.differences(lines[0]["merge"], self.identity))
        return same and Manifest.find(self._stage) is not None

    def clear(self) -> None:
        """Remove what a published checkpoint has left behind."""
        shutil.rmtree(self._stage, ignore_errors=True)

    def is_published(self) -> bool:
        """Whether the folder holds a checkpoint of this recipe and layout, whole."""
        manifest = Manifest.find(self.folder)
        if manifest is None or Manifest.find(self._stage) is not None:
            return False
        same = all(self.identity.get(key) == value for key, value in manifest.recipe.items())
        shards = {
            s.name: {"bytes": s.bytes, "xxh3": checksum(s.header)} for s in self.layout.shards
        }
        same = same and all(manifest.files.get(name) == entry for name, entry in shards.items())
        return same and all((self.folder / name).is_file() for name in manifest.files)


def _makes_whole(name: str) -> bool:
    """Whether loaders take a folder with this file for a checkpoint."""
    return name in (INDEX, SINGLE)
