"""Honest comparisons: who computes what, how fast, and how far from the machine's limit.

A :class:`Case` is one computation on one input; its :class:`Provider` s are the ways to get it:
our backends, other people's ways, and ceilings (what the memory can do). Within a case

* every result is checked by the tolerance rule first; a wrong one is reported and gets no ratio;
* providers run interleaved, A B C ... A B C ..., so that a machine that changes its speed changes
  it for all; one that is wrong or ten times slower than the fastest joins the first rounds only;
* every call starts with a cold last-level cache and warm memory: two calls before the first timed
  one, and on the CPU a malloc that keeps what it has (``machine.WARM_MALLOC``);
* CUDA is timed by events around a call that is queued as a whole before it starts (timing.py), the
  CPU by the clock; times are medians, with 20 and 80 % quantiles.

``GB/s`` is the case's least traffic (every input once, every output once) over the time, whatever
the provider really moves, and ``TFLOP/s`` the formula's operations over the time; percentages are
of ceilings measured in the same rounds. ``ratio`` is the fastest correct provider of the other side
(ours against theirs) over this one: above 1, this one is faster. ``peak`` is the memory that one
call takes through torch's allocator, its result included.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

import neulig_fast
from neulig_fast._experts import return_freed_memory
from neulig_fast._registry import BACKENDS, Op

from . import machine, timing
from . import rows as report
from .rows import Row
from .selection import Selection, selecting
from .timing import Clock, Time

RESULTS = Path(__file__).resolve().parent / "results"
ROUNDS, SLOW_ROUNDS, MOST_ROUNDS, CASE_SECONDS = 5, 3, 31, 3.0
console = Console(width=max(shutil.get_terminal_size().columns, 125))


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    ``steps``: how many of the case's computations one call does (a fraction when it does part of
    one); times are per one. ``needs``: bytes beyond the inputs; ``holds``: what it keeps of them.
    ``traffic`` and ``flops``: its own, for a ceiling. ``note``: added to the row's mode; with
    ``checked=False`` says why there is no check. ``within``: entered around each call, untimed.
    """

    name: str
    run: Callable[[], Any]
    side: Literal["ours", "theirs", "ceiling"] = "theirs"
    steps: float = 1
    needs: int = 0
    holds: int = 0
    traffic: int | None = None
    flops: int = 0
    note: str = ""
    checked: bool = True
    within: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclasses.dataclass(frozen=True)
class Case:
    """One computation. ``traffic`` and ``resident`` (inputs) in bytes; ``flops``: the operations of
    its formula; ``check`` raises AssertionError for a result outside the tolerance rule."""

    op: str
    mode: str
    shape: str
    dtype: torch.dtype
    device: str
    threads: int
    providers: list[Provider]
    check: Callable[[Any], None]
    traffic: int = 0
    flops: int = 0
    resident: int = 0
    numbers: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        numbers = " ".join(f"{k}={v}" for k, v in self.numbers.items() if k != "P")
        dtype = str(self.dtype).removeprefix("torch.")
        where = f"{self.device}, {self.threads} threads" if self.device == "cpu" else self.device
        words = (self.op, self.mode, self.shape, numbers, dtype, where)
        return " ".join(filter(None, words))


def ours(
    op: Op,
    device: str,
    run: Callable[[], Any],
    args: tuple[Any, ...],
    reference_needs: int = 0,
    needs: int = 0,
) -> list[Provider]:
    """``run`` with every backend of ``op`` that is able here; the reason for every other one.

    ``needs``: bytes of the result; ``reference_needs``: what the reference takes on top of it,
    counted twice on a CPU: blocks of several sizes take up to that much of glibc's heap.
    """
    found = []
    for backend in BACKENDS:
        reason = op.why_not(backend, device, args)
        if backend == "triton" and device == "cpu":
            continue  # its interpreter is for tests; nobody runs it
        if reason is None:
            call = neulig_fast.use_backend(backend)(run)
            more = reference_needs * (1 + (device == "cpu")) if backend == "torch" else 0
            found.append(Provider(f"neulig_fast/{backend}", call, side="ours", needs=needs + more))
        elif backend in op.impls and not reason.startswith("for "):
            say(f"{op.name}: no {backend} backend on {device}: {reason}")
    return found


@functools.cache
def say(text: str) -> None:
    """A sentence about what is left out, once."""
    console.print(f"[yellow]{escape(text)}")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile as one static graph. :func:`measure` forgets earlier graphs in every case."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def _able(case: Case, provider: Provider) -> bool:
    short = case.resident + provider.needs - machine.memory(case.device)
    if short > 0:
        say(f"{case}: {provider.name} skipped, {short / 1e9:.1f} GB of memory short")
    return short <= 0


def _checked(case: Case, provider: Provider) -> tuple[str, float | None]:
    """``ok``, or what is wrong, and the peak of the memory that the call takes, in MB."""
    peak = None
    try:
        if provider.side == "ceiling":
            provider.run()
            return "", None
        with provider.within():
            result, peak = timing.with_peak(provider.run, case.device)
        if not provider.checked:
            return "not checked", peak
        case.check(result)
    except AssertionError as error:
        return f"wrong: {error}", peak
    except RuntimeError as error:  # out of memory, or a compiler that cannot
        return f"failed: {str(error).splitlines()[0][:100]}", None
    return "ok", peak


def measure(case: Case, quick: bool = False, advance: Callable[[str], Any] = str) -> list[Row]:
    """Check and time the case's providers; one row each. ``advance`` hears what is being done."""
    from torch._inductor import config as inductor  # takes a second: not before it is needed

    torch.compiler.reset()
    before = torch.get_num_threads()
    if case.device == "cpu":
        torch.set_num_threads(case.threads)
    try:
        # Inductor writes its number of threads into its code, but not into the name under which it
        # keeps that code on disk: without the setting it may fetch code for other cases' threads.
        with inductor.patch({"cpp.threads": case.threads}):
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
) -> tuple[dict[str, tuple[str, float | None]], dict[str, list[Time]]]:
    clock, checks, first = Clock(case.device), {}, {}
    able = [provider for provider in case.providers if _able(case, provider)]
    for provider in able:
        advance(f"{case}: {provider.name}")
        clock.make_room(provider.needs)
        checks[provider.name] = _checked(case, provider)
        if not checks[provider.name][0].startswith("failed"):
            first[provider.name] = _timed(clock, provider).ms
    able = [provider for provider in able if provider.name in first]
    fastest = min((first[p.name] / p.steps for p in able if p.side != "ceiling"), default=0.0)
    brief = {
        p.name
        for p in able
        if first[p.name] / p.steps > 10 * fastest > 0 or checks[p.name][0].startswith("wrong")
    }
    usual = sum(time for name, time in first.items() if name not in brief)
    rounds = min(max(round(1e3 * CASE_SECONDS / max(usual, 1e-3)), ROUNDS), MOST_ROUNDS)
    rounds = SLOW_ROUNDS if quick else rounds
    times: dict[str, list[Time]] = {name: [] for name in first}
    for k in range(rounds):
        advance(f"{case}: round {k + 1} of {rounds}")
        for provider in able:
            if k < SLOW_ROUNDS or provider.name not in brief:
                clock.make_room(provider.needs, first)
                times[provider.name].append(_timed(clock, provider).per(provider.steps))
    return checks, times


def _timed(clock: Clock, provider: Provider) -> Time:
    with provider.within():
        clock.warm(provider.name, provider.run)
        return clock(provider.run)


def run(
    cases: Iterator[Case], selection: Selection, keep: Callable[[list[Row]], Any] = len
) -> list[Row]:
    """Measure the wanted cases one after the other, printing a table each.

    ``keep`` gets the rows of a case as soon as there are any: what comes later may be interrupted.
    """
    rows: list[Row] = []
    with selecting(selection):
        for case in cases:
            case = selection.narrowed(case)
            if case is not None:
                new = _shown(case, selection.quick)
                keep(new)
                rows += new
            del case  # and with it its inputs, before the next ones are made
            gc.collect()
            return_freed_memory()  # holes of one case rarely fit the next one's tensors
    return rows


def _shown(case: Case, quick: bool) -> list[Row]:
    columns = (SpinnerColumn(), "{task.description}", TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(str(case))
        rows = measure(case, quick, lambda text: progress.update(task, description=text))
    console.print(report.table(str(case), rows))
    for sentence in report.refusals(rows):
        console.print(f"[yellow]{escape(sentence)}")
    return rows


def main(
    name: str,
    cases: Callable[..., Iterator[Case]],
    parser: argparse.ArgumentParser | None = None,
) -> None:
    """The command line of one benchmark, for the committed rows: its whole grid.

    ``cases(device, quick)`` yields what it measures. The file is written anew after every case.
    What a ``parser`` of the benchmark's own adds is handed to ``cases`` by name.
    """
    parser = parser or argparse.ArgumentParser(description=f"Benchmark {name}.")
    parser.add_argument("--quick", action="store_true", help="toy sizes; nothing is committed")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: all there are")
    parser.add_argument("--out", type=Path, help="CSV (default: results/<device>/<op>.csv)")
    options = parser.parse_args()
    own = {k: v for k, v in vars(options).items() if k not in ("quick", "device", "out")}
    machine.start_over_with_warm_malloc()
    files: dict[Path, list[Row]] = {}
    for device in machine.devices(options.device):
        path = options.out or RESULTS / machine.slug(device) / f"{name}.csv"
        rows = files.setdefault(path, [])
        keep = rows.extend
        if options.out or not options.quick:
            keep = functools.partial(report.append, path, rows)
        run(cases(device, options.quick, **own), Selection(quick=options.quick), keep)
        keep([])  # a file, also where there was no case
    failures = [row for rows in files.values() for row in rows if report.is_failure_of_ours(row)]
    if failures:
        sys.exit("\n".join(f"{row['provider']}: {row['check']}" for row in failures))
