"""What an evaluation checks before any image meets a model; every function returns its faults."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import _checks
from . import batchnorm as bn
from .batches import Peeked
from .modes import MODES

if TYPE_CHECKING:
    from .engine import NeuLig

BASELINES = ("uniform", "hard")
Loader = Iterable[tuple[Tensor, Tensor]]


def check_mappings(**arguments: Any) -> None:
    """TypeError naming every argument that is neither a mapping nor None."""
    faults = [
        f"{name} must map tasks to their values, got {type(value).__name__}"
        for name, value in arguments.items()
        if value is not None and not isinstance(value, Mapping)
    ]
    _checks.raise_all("evaluate", faults, TypeError)


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


def peeked(
    engine: NeuLig, loaders: Mapping[str, Loader], looks: dict[int, Peeked]
) -> tuple[dict[str, Peeked], list[str]]:
    """The loaders of known tasks, and what their names and first batches tell.

    ``looks`` gets them by the loader's id: a loader that serves twice is looked at once, for a
    second ``iter`` may end the first one's reading.
    """
    found: dict[str, Peeked] = {}
    faults = [] if loaders else ["loaders must hold at least one task"]
    for task, loader in loaders.items():
        if task not in engine.heads:
            hint = _checks.did_you_mean(str(task), engine.heads)
            faults.append(f"no head for task {task!r} (known: {', '.join(engine.heads)}){hint}")
            continue
        if not isinstance(loader, Iterable):
            got = type(loader).__name__
            faults.append(f"the loader of task {task!r} must be iterable, got {got}")
            continue
        if id(loader) not in looks:
            looks[id(loader)] = Peeked(loader)
        found[task] = looks[id(loader)]
        fault = found[task].fault(engine.heads[task].num_classes, f"task {task!r}")
        if fault is not None:
            faults.append(fault)
    return found, faults


def calibration_faults(
    engine: NeuLig, tasks: Iterable[str], calibration: Mapping[str, Iterable[Any]]
) -> list[str]:
    """Tasks without a merge vector, and calibration loaders that cannot serve."""
    faults = []
    for task in tasks:
        if task in engine.heads and task not in {*calibration, *engine.calibration}:
            faults.append(
                f"task {task!r} has no calibration vector: call fit(), or pass "
                f"calibration={{{task!r}: loader}}"
            )
    for task, loader in calibration.items():
        if task not in engine.heads:
            hint = _checks.did_you_mean(task, engine.heads)
            faults.append(f"calibration: no head for task {task!r}{hint}")
        elif not isinstance(loader, Iterable) or isinstance(loader, Iterator):
            got = type(loader).__name__
            faults.append(f"calibration[{task!r}] must be re-iterable, got {got}")
    return faults
