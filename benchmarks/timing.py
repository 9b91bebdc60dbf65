"""How one call is timed, and how much memory it takes at its peak."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from neulig_fast._experts import return_freed_memory

from . import machine

_MOST_AHEAD = 0.1  # seconds that a GPU is kept waiting at most


class Time(NamedTuple):
    """Milliseconds of one call; on a GPU, microseconds of the host to issue it."""

    ms: float
    host_us: float | None

    def per(self, steps: float) -> Time:
        """The time of one of ``steps`` equal parts."""
        return Time(self.ms / steps, None if self.host_us is None else self.host_us / steps)


class Clock:
    """Times one call from a cold cache and, on a CPU, with warm memory."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.other = torch.ones(2 * machine.cache_bytes(device) // 4, device=device)
        self._cold: set[str] = set()

    def make_room(self, needs: int, others: Iterable[str] = ()) -> None:
        """Give freed memory back when a call that takes ``needs`` bytes may not find enough.

        An aligned block rarely fits into the hole that one of its size left, so that glibc's heap
        may grow with every call of the same function, to several times its needs. ``others`` then
        find cold memory and are called once more before they are timed.
        """
        if self.device == "cpu" and not machine.has_room(needs):
            return_freed_memory()
            self._cold = set(others)

    def warm(self, name: str, run: Callable[[], Any]) -> None:
        """Call it untimed if memory was given back since its last call."""
        if name in self._cold:
            self._cold.remove(name)
            run()

    def __call__(self, run: Callable[[], Any]) -> Time:
        if self.device == "cuda":
            host = _host_seconds(run)
            return Time(self._device_ms(run, host), 1e6 * host)
        self.other.sum()  # read, not written: nothing is left to be written back
        time.sleep(0.002)  # OpenMP's waiting threads spin that long; some providers use others
        begin = time.perf_counter()
        result = run()
        elapsed = time.perf_counter() - begin
        del result  # not timed
        return Time(1e3 * elapsed, None)

    def _device_ms(self, run: Callable[[], Any], host: float) -> float:
        """The device's own time: it waits until the host, which needs ``host`` seconds to issue
        the call, has queued all of it. Otherwise a call shorter than its launches is timed as they
        are."""
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.other.sum()
        torch.cuda._sleep(int(min(2 * host + 1e-4, _MOST_AHEAD) * _cycles_per_second()))
        start.record()
        result = run()
        stop.record()
        torch.cuda.synchronize()
        del result
        return start.elapsed_time(stop)


def _host_seconds(run: Callable[[], Any]) -> float:
    """How long the host needs to issue a call to an idle GPU; one that waits for it, waits here."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    result = run()
    elapsed = time.perf_counter() - begin
    torch.cuda.synchronize()
    del result
    return elapsed


@functools.cache
def _cycles_per_second() -> float:
    """Of the clock that ``torch.cuda._sleep`` counts, measured."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = 20_000_000
    torch.cuda._sleep(1000)
    start.record()
    torch.cuda._sleep(cycles)
    stop.record()
    torch.cuda.synchronize()
    return 1e3 * cycles / start.elapsed_time(stop)


def with_peak(run: Callable[[], Any], device: str) -> tuple[Any, float]:
    """A call's result, and the peak in MB of what it had allocated through torch at any time."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        return result, (torch.cuda.max_memory_allocated() - before) / 1e6
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it complains of every missing GPU
    # torch.profiler's, around this one, would make a tree of all events first.
    with torch.autograd.profiler.profile(profile_memory=True) as profiler:
        result = run()
    changes = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return result, peak / 1e6
