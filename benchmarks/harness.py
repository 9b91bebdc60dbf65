"""Honest comparisons: who computes what, how fast, and how far from the machine's limit.

A :class:`Case` is one computation on one input; its :class:`Provider` s are the ways to get it:
our backends, other people's ways, and ceilings (what the memory can do). Within a case

* every result is checked by the tolerance rule first; a wrong one is reported and gets no ratio;
* providers run interleaved, A B C ... A B C ..., so that a machine that changes its speed changes
  it for all; one that is wrong or ten times slower than the fastest joins the first rounds only;
* every call starts with a cold last-level cache and warm memory: two calls before the first timed
  one, and on the CPU a malloc that keeps what it has (``machine.WARM_MALLOC``);
* CUDA is timed by events, the CPU by the clock; times are medians, with 20 and 80 % quantiles.

``GB/s`` is the case's least traffic (every input once, every output once) over the time, whatever
the provider really moves; percentages are of ceilings measured in the same rounds. ``ratio`` is
the fastest correct provider of the other side (ours against theirs) over this one: above 1, this
one is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import machine
import rows as report
import torch
from rich.console import Console
from rich.progress import Progress
from rows import Row

import neulig_fast
from neulig_fast._experts import return_freed_memory
from neulig_fast._registry import BACKENDS, Op

RESULTS = Path(__file__).resolve().parent / "results"
ROUNDS, SLOW_ROUNDS, MOST_ROUNDS, CASE_SECONDS = 5, 3, 31, 3.0
console = Console(width=110)


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    ``steps``: how many of the case's computations one call does (a fraction when it does part of
    one); times are per one. ``needs``: bytes beyond the inputs. ``traffic``: its own bytes, for a
    ceiling. ``note``: added to the row's mode; with ``checked=False`` says why there is no check.
    """

    name: str
    run: Callable[[], Any]
    side: Literal["ours", "theirs", "ceiling"] = "theirs"
    steps: float = 1
    needs: int = 0
    traffic: int | None = None
    note: str = ""
    checked: bool = True


@dataclasses.dataclass(frozen=True)
class Case:
    """One computation. ``traffic`` and ``resident`` (inputs) in bytes; ``check`` raises
    AssertionError for a result outside the tolerance rule."""

    op: str
    mode: str
    shape: str
    dtype: torch.dtype
    device: str
    threads: int
    providers: list[Provider]
    check: Callable[[Any], None]
    traffic: int = 0
    resident: int = 0
    numbers: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        numbers = " ".join(f"{k}={v}" for k, v in self.numbers.items() if k != "P")
        dtype = str(self.dtype).removeprefix("torch.")
        where = f"{self.device}, {self.threads} threads" if self.device == "cpu" else self.device
        return f"{self.op} {self.mode} {self.shape} {numbers} {dtype} {where}"


def ours(
    op: Op, device: str, run: Callable[[], Any], args: tuple[Any, ...], reference_needs: int = 0
) -> list[Provider]:
    """``run`` with every backend of ``op`` that is able here; the reason for every other one.

    ``reference_needs``: bytes that the reference takes for intermediate results.
    """
    found = []
    for backend in BACKENDS:
        reason = op.why_not(backend, device, args)
        if backend == "triton" and device == "cpu":
            continue  # its interpreter is for tests; nobody runs it
        if reason is None:
            call = neulig_fast.use_backend(backend)(run)
            needs = reference_needs if backend == "torch" else 0
            found.append(Provider(f"neulig_fast/{backend}", call, side="ours", needs=needs))
        elif backend in op.impls and not reason.startswith("for "):
            say(f"{op.name}: no {backend} backend on {device}: {reason}")
    return found


@functools.cache
def say(text: str) -> None:
    """A sentence about what is left out, once."""
    console.print(f"[yellow]{text}")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile as one static graph. :func:`measure` forgets earlier graphs in every case."""
    return torch.compile(function, dynamic=False, fullgraph=True)


class _Clock:
    """Times one call from a cold cache, in milliseconds."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.other = torch.ones(2 * machine.cache_bytes(device) // 4, device=device)

    def __call__(self, run: Callable[[], Any]) -> float:
        self.other.sum()  # read, not written: nothing is left to be written back
        if self.device == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = run()
            stop.record()
            torch.cuda.synchronize()
            del result
            return start.elapsed_time(stop)
        time.sleep(0.002)  # OpenMP's waiting threads spin that long; some providers use others
        begin = time.perf_counter()
        result = run()
        elapsed = time.perf_counter() - begin
        del result  # not timed
        return 1e3 * elapsed


def _able(case: Case, provider: Provider) -> bool:
    short = case.resident + provider.needs - machine.memory(case.device)
    if short > 0:
        say(f"{case}: {provider.name} skipped, {short / 1e9:.1f} GB of memory short")
    return short <= 0


def _checked(case: Case, provider: Provider) -> tuple[str, float | None]:
    """``ok``, or what is wrong, and the peak of a CUDA provider's own memory in MB."""
    on_gpu, peak = case.device == "cuda", None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    try:
        result = provider.run()
        if on_gpu:
            peak = (torch.cuda.max_memory_allocated() - before) / 1e6
        if provider.side == "ceiling" or not provider.checked:
            return "" if provider.side == "ceiling" else "not checked", peak
        case.check(result)
    except AssertionError as error:
        return f"wrong: {error}", peak
    except RuntimeError as error:  # out of memory, or a compiler that cannot
        return f"failed: {str(error).splitlines()[0][:100]}", None
    return "ok", peak


def measure(case: Case, quick: bool = False, advance: Callable[[str], Any] = str) -> list[Row]:
    """Check and time the case's providers; one row each. ``advance`` hears what is being done."""
    torch.compiler.reset()
    before = torch.get_num_threads()
    if case.device == "cpu":
        torch.set_num_threads(case.threads)
    try:
        checks, times = _times(case, quick, advance)
    finally:
        torch.set_num_threads(before)
    return report.compare(
        case,
        [
            report.row(case, provider, *checks[provider.name], times.get(provider.name, []))
            for provider in case.providers
            if provider.name in checks
        ],
    )


def _times(
    case: Case, quick: bool, advance: Callable[[str], Any]
) -> tuple[dict[str, tuple[str, float | None]], dict[str, list[float]]]:
    clock, checks, first = _Clock(case.device), {}, {}
    able = [provider for provider in case.providers if _able(case, provider)]
    for provider in able:
        advance(f"{case}: {provider.name}")
        checks[provider.name] = _checked(case, provider)
        if not checks[provider.name][0].startswith("failed"):
            first[provider.name] = clock(provider.run)
    able = [provider for provider in able if provider.name in first]
    fastest = min((first[p.name] / p.steps for p in able if p.side != "ceiling"), default=0.0)
    brief = {
        p.name
        for p in able
        if first[p.name] / p.steps > 10 * fastest > 0 or checks[p.name][0].startswith("wrong")
    }
    usual = sum(time for name, time in first.items() if name not in brief)
    rounds = min(max(round(1e3 * CASE_SECONDS / usual), ROUNDS), MOST_ROUNDS)
    times: dict[str, list[float]] = {name: [] for name in first}
    for k in range(SLOW_ROUNDS if quick else rounds):
        advance(f"{case}: round {k + 1} of {rounds}")
        for provider in able:
            if k < SLOW_ROUNDS or provider.name not in brief:
                times[provider.name].append(clock(provider.run) / provider.steps)
    return checks, times


def run(cases: Iterator[Case], *, quick: bool) -> list[Row]:
    """Measure case after case, printing a table each."""
    rows: list[Row] = []
    for case in cases:
        with Progress("{task.description}", console=console, transient=True) as progress:
            task = progress.add_task(str(case))
            new = measure(
                case, quick, lambda text, t=task, p=progress: p.update(t, description=text)
            )
        rows += new
        console.print(report.table(str(case), new))
        del case  # and with it its inputs, before the next ones are made
        gc.collect()
        return_freed_memory()  # holes of one case rarely fit the next one's tensors
    return rows


def main(name: str, cases: Callable[[str, bool], Iterator[Case]]) -> None:
    """The command line of a benchmark. ``cases(device, quick)`` yields what it measures."""
    parser = argparse.ArgumentParser(description=f"Benchmark {name}.")
    parser.add_argument("--quick", action="store_true", help="toy sizes; nothing is committed")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: all there are")
    parser.add_argument("--out", type=Path, help="CSV (default: results/<device>/<op>.csv)")
    options = parser.parse_args()
    if os.environ.get("GLIBC_TUNABLES") != machine.WARM_MALLOC:
        # malloc reads its settings before main(), so the program starts over with them.
        os.environ["GLIBC_TUNABLES"] = machine.WARM_MALLOC
        os.execv(sys.executable, [sys.executable, *sys.argv])
    present = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    rows: list[Row] = []
    for device in [options.device] if options.device else present:
        rows += (new := run(cases(device, options.quick), quick=options.quick))
        if not options.quick and not options.out:
            report.write(RESULTS / machine.slug(device) / f"{name}.csv", new)
    if options.out:
        report.write(options.out, rows)
    failures = [row for row in rows if report.is_failure_of_ours(row)]
    if failures:
        sys.exit("\n".join(f"{row['provider']}: {row['check']}" for row in failures))
