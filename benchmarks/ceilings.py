"""What the memory of this machine can do, measured in the same rounds as the providers.

``copy``: one row to another by ``Tensor.copy_`` and, on the CPU, by the C library's memmove; the
better one is the ceiling. ``empty launch``: a kernel that does nothing, the least time of any call
on a GPU. ``stream``: the case's own traffic, N reads and one write (or reads
only), by a plain loop in C (stream.c); only where there is a C compiler.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from .harness import Provider

_LINE = 64  # bytes that stream.c moves at a time


@functools.cache
def library() -> ctypes.CDLL | None:
    """stream.c, compiled; None without a C compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    source = Path(__file__).with_name("stream.c")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "stream.so"
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"no stream ceiling: {compiler} cannot compile stream.c: {done.stderr.strip()}")
            return None
        return ctypes.CDLL(str(target))


def _in_threads(
    threads: int, lines: int, work: Callable[[int, int], object], result: Tensor
) -> Callable[[], Tensor]:
    """Calls ``work(begin, end)`` on equal parts of range(lines), in as many threads."""
    pool = ThreadPoolExecutor(threads)
    cuts = [lines * i // threads for i in range(threads + 1)]

    def run() -> Tensor:
        list(pool.map(work, cuts[:-1], cuts[1:]))
        return result

    return run


def ceilings(rows: Tensor, threads: int, *, write: bool) -> Iterator[Provider]:
    """Ceilings for an op that reads all of ``rows`` (M, P) and, with ``write``, writes one row.

    Rows are contiguous, start on 64-byte boundaries and are multiples of 64 bytes long. A run
    returns what it wrote: row 0, the exclusive or of all rows, or one line per thread.
    """
    source, out = rows[0], torch.zeros_like(rows[0])
    size = source.nbytes

    def ceiling(name: str, run: Callable[[], object], traffic: int) -> Provider:
        return Provider(f"ceiling/{name}", run, side="ceiling", traffic=traffic)

    yield ceiling("copy torch", lambda: out.copy_(source), 2 * size)
    if rows.device.type != "cpu":
        yield ceiling("empty launch", lambda: torch.cuda._sleep(0), 0)
        return
    into, begin, lines = out.data_ptr(), source.data_ptr(), size // _LINE

    def move(a: int, b: int) -> None:
        ctypes.memmove(into + a * _LINE, begin + a * _LINE, (b - a) * _LINE)

    yield ceiling("copy memmove", _in_threads(threads, lines, move, out), 2 * size)
    if library() is None:
        return
    pointers = (ctypes.c_void_p * len(rows))(*(row.data_ptr() for row in rows))
    count, long = len(rows), ctypes.c_ssize_t
    if not write:
        sinks = torch.zeros(threads, _LINE, dtype=torch.uint8)

        def read(a: int, b: int) -> None:
            sink = ctypes.c_void_p(sinks[a * threads // max(lines, 1)].data_ptr())
            library().stream_read(pointers, count, sink, long(a), long(b))

        yield ceiling("stream", _in_threads(threads, lines, read, sinks), count * size)
        return

    def store(non_temporal: int, a: int, b: int) -> None:
        to = ctypes.c_void_p(into)
        library().stream_write(pointers, count, to, long(a), long(b), non_temporal)

    for name, flag in (("stream", 0), ("stream non-temporal", 1)):
        run = _in_threads(threads, lines, functools.partial(store, flag), out)
        yield ceiling(name, run, (count + 1) * size)
