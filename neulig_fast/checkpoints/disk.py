"""Files: room taken before the work, whole writes, and syncing while the rest is merged."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

_FLUSH_BYTES = 64 << 20


class Flusher:
    """A thread that syncs files once enough has been written to them.

    A failure to sync is told only once per file: it is kept, and raised by what comes next.
    """

    def __init__(self) -> None:
        self._written: dict[int, int] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="flush", daemon=True)
        self._thread.start()

    def wrote(self, handle: int, count: int) -> None:
        """So many bytes were written to a file.

        Raises:
            OSError: what was written earlier did not reach the disk.
        """
        with self._changed:
            self._raise()
            self._written[handle] = self._written.get(handle, 0) + count
            if self._written[handle] >= _FLUSH_BYTES:
                self._changed.notify()

    def close(self) -> None:
        """End the thread; files may be closed afterwards.

        Raises:
            OSError: as :meth:`wrote`.
        """
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._raise()

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while (handle := self._next()) is not None:
            try:
                os.fdatasync(handle)
            except OSError as error:
                with self._changed:
                    self._failure = error
                return

    def _next(self) -> int | None:
        """A file with enough to sync; None at the end."""
        with self._changed:
            while not self._closed:
                for handle, count in self._written.items():
                    if count >= _FLUSH_BYTES:
                        self._written[handle] = 0
                        return handle
                self._changed.wait()
        return None


def reserve(handle: int, length: int, path: Path) -> None:
    """Take the disk space now, so that a full disk is met before the work."""
    try:
        os.posix_fallocate(handle, 0, length)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise OSError(error.errno, f"{path}: {error.strerror} ({length} bytes)") from error
    os.ftruncate(handle, length)


def nearest(folder: Path) -> Path:
    """The folder, or what it will be made in.

    Raises:
        NotADirectoryError: that is a file.
    """
    found = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not found.is_dir():
        raise NotADirectoryError(f"{found}: is a file, not a folder")
    return found


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Errors of a handle tell whose it is."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_all(handle: int, data: bytes | memoryview, at: int | None = None) -> None:
    """All of it, at a place or at the end."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        rest = view[done:]
        done += os.write(handle, rest) if at is None else os.pwrite(handle, rest, at + done)


def locked(folder: Path) -> int:
    """A handle of a folder that no other process works on; the system ends that with the process.

    Raises:
        ValueError: one does. File systems that have no such locks cannot tell.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            os.close(handle)
            raise ValueError(f"{folder}: another merge into it is running") from error
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.EINVAL):
            os.close(handle)
            raise
    return handle


def sync(path: Path) -> None:
    """A file's bytes reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
