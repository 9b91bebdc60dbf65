"""What an evaluation checks before any image meets a model; every function returns its faults."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import _checks
from . import batchnorm as bn
from .features import unpack
from .modes import MODES

if TYPE_CHECKING:
    from .engine import NeuLig

BASELINES = ("uniform", "hard")
Loader = Iterable[tuple[Tensor, Tensor]]


def all_modes(
    engine: NeuLig, modes: Sequence[str] | None, batchnorm: str, calibrated: bool
) -> tuple[tuple[str, ...], list[str]]:
    """The modes to run, baselines included, and what is wrong with them."""
    faults = bn.policy_faults(engine.pool, batchnorm, calibrated=calibrated)
    alone = bn.policy_faults(engine.pool, batchnorm, per_sample=True) if not faults else []
    if modes is None:
        modes = [mode for mode in MODES if mode != "per_sample" or not alone]
    elif isinstance(modes, str):
        modes = [modes]
    for mode in modes:
        if mode not in MODES:
            hint = _checks.did_you_mean(mode, MODES)
            faults.append(f"unknown mode {mode!r} (known: {', '.join(MODES)}){hint}")
    if "per_sample" in modes:
        faults += alone
    return tuple(dict.fromkeys((*modes, *BASELINES))), faults


def own_experts(
    engine: NeuLig, tasks: Iterable[str], own: Mapping[str, int | str] | None
) -> tuple[dict[str, int] | None, list[str]]:
    """Task -> index of its expert, or None where nobody said and nothing tells."""
    names, heads = list(engine.pool.names), list(engine.heads)
    tasks = [task for task in tasks if task in engine.heads]
    if own is None:
        if set(tasks) <= set(names):
            return {task: names.index(task) for task in tasks}, []
        if len(heads) == len(names):
            return {task: heads.index(task) for task in tasks}, []
        return None, []
    known: dict[str, int] = {}
    faults = []
    for task in tasks:
        expert = own.get(task)
        if expert in names:
            known[task] = names.index(expert)
        elif isinstance(expert, int) and 0 <= expert < len(names):
            known[task] = expert
        else:
            what = "is missing" if task not in own else f"is {expert!r}"
            faults.append(
                f"own[{task!r}] {what}: give an index below {len(names)} or one of "
                f"{', '.join(names)}"
            )
    return known, faults


def peeked(engine: NeuLig, loaders: Mapping[str, Loader]) -> tuple[dict[str, Loader], list[str]]:
    """The loaders, and what their names and first batches tell.

    A one-shot iterator gets its first batch back; anything else is asked for a new iterator later.
    """
    found: dict[str, Loader] = {}
    faults = [] if loaders else ["loaders must hold at least one task"]
    for task, loader in loaders.items():
        if task not in engine.heads:
            hint = _checks.did_you_mean(task, engine.heads)
            faults.append(f"no head for task {task!r} (known: {', '.join(engine.heads)}){hint}")
            continue
        iterator = iter(loader)
        first = next(iterator, None)
        found[task] = _chained(first, iterator) if iterator is loader else loader
        if first is None:
            faults.append(f"the loader of task {task!r} is empty")
            continue
        try:
            unpack(first, engine.heads[task].num_classes, f"task {task!r}, batch 0")
        except (TypeError, ValueError) as error:
            faults.append(str(error))
    return found, faults


def _chained(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def calibration_faults(
    engine: NeuLig, tasks: Iterable[str], calibration: Mapping[str, Iterable[Any]]
) -> list[str]:
    """Tasks without a merge vector, and calibration loaders that cannot serve."""
    faults = []
    for task in tasks:
        if task not in calibration and task not in engine.calibration:
            faults.append(
                f"task {task!r} has no calibration vector: call fit(), or pass "
                f"calibration={{{task!r}: loader}}"
            )
    for task, loader in calibration.items():
        if task not in engine.heads:
            hint = _checks.did_you_mean(task, engine.heads)
            faults.append(f"calibration: no head for task {task!r}{hint}")
        elif iter(loader) is loader:
            faults.append(f"calibration[{task!r}] must be re-iterable, got an iterator")
    return faults
