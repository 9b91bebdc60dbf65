"""A whole model as the one tensor that a method sees: what it measures before anything is merged.

All tensors that are merged lie one after the other, in the order of the plan. What a method wants
to know of them is found in passes over the model, by all threads and processes; results of one
recipe ask together, and what is alike is measured once. Numbers are added up tensor by tensor, so
that what is found depends on nothing but the models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from .._checks import raise_all
from ..methods import Method, Statistic, Task
from . import dtypes
from .planned import Known, Planned

# One pass over the model: the answers to some statistics.
Pass = Callable[[Sequence[Statistic]], Sequence[Any]]


class Whole(NamedTuple):
    """All tensors of a result that are merged.

    Attributes:
        task: of all their elements, with the parameters that are of the model.
        places: by name of a tensor, where its elements begin.
        bytes: to be read in a pass.
    """

    task: Task
    places: Mapping[str, int]
    bytes: int


def as_one(method: Method, tensors: Sequence[Planned]) -> tuple[list[Planned], Whole | None]:
    """The tensors in one type, and the whole that they are; None where none is merged.

    Raises:
        ValueError: parameters that must be of the whole model and differ between tensors; all.
    """
    merged = [planned for planned in tensors if planned.task is not None]
    tasks = [planned.task for planned in merged if planned.task is not None]
    if not tasks:
        return list(tensors), None
    raise_all("merge", _differences(method, tasks))
    dtype = dtypes.common([task.dtype for task in tasks])
    places, end = {}, 0
    for task in tasks:
        places[task.name], end = end, end + task.elements
    settings = {name: tasks[0].settings[name] for name in method.of_model or ()}
    whole = replace(tasks[0], name="", shape=(end,), settings=settings, dtype=dtype)
    return [_in_type(planned, dtype) for planned in tensors], Whole(
        whole, places, sum(planned.bytes for planned in merged)
    )


def _differences(method: Method, tasks: Sequence[Task]) -> Iterator[str]:
    counts = {task.models: task.name for task in tasks}
    if len(counts) > 1:
        got = ", ".join(f"{count} for {name!r}" for count, name in counts.items())
        yield f"neulig_fast.scope: model needs as many models in all slices, got {got}"
        return
    for name in method.of_model or ():
        first = tasks[0].settings[name]
        other = next((task for task in tasks if task.settings[name] != first), None)
        if other is not None:
            yield (
                f"{name}: must be the same for all tensors with neulig_fast.scope: model, got "
                f"{first} for {tasks[0].name!r} and {other.settings[name]} for {other.name!r}"
            )


def _in_type(planned: Planned, dtype: str) -> Planned:
    if planned.task is None:
        return planned
    return planned._replace(dtype=dtype, task=replace(planned.task, dtype=dtype))


def known(
    method: Method,
    wholes: Sequence[Whole],
    jobs: Sequence[Sequence[Planned]],
    look: Pass,
) -> list[list[Planned]]:
    """Jobs whose tensors know what was measured of their models.

    Args:
        wholes: of the results, in the order of a job's tensors.
    """
    found = measured(method, [whole.task for whole in wholes], look)

    def told(planned: Planned, whole: Whole, value: Any) -> Planned:
        if planned.task is None:
            return planned
        return planned._replace(known=Known(value, whole.places[planned.output.name]))

    return [[told(*each) for each in zip(job, wholes, found, strict=True)] for job in jobs]


def measured(method: Method, tasks: Sequence[Task], look: Pass) -> list[Any]:
    """What ``measure`` returns for each task of one model, in the passes of the one with most."""
    if method.measure is None:
        return [None] * len(tasks)
    distinct: list[Task] = []
    for task in tasks:
        if all(task.settings != other.settings for other in distinct):
            distinct.append(task)
    found = _together([method.measure(task) for task in distinct], look)
    settings = [task.settings for task in distinct]
    return [found[settings.index(task.settings)] for task in tasks]


def _together(running: Sequence[Any], look: Pass) -> list[Any]:
    """What generators of statistics return that are asked side by side."""
    found: dict[int, Any] = {}
    answers: dict[int, Any] = dict.fromkeys(range(len(running)))
    while answers:
        asked: dict[int, Statistic] = {}
        for i, answer in answers.items():
            try:
                asked[i] = running[i].send(answer)
            except StopIteration as done:
                found[i] = done.value
        wanted = list(dict.fromkeys(s for s in asked.values() if s.over != "whole"))
        known_now = dict(zip(wanted, look(wanted) if wanted else (), strict=True))
        answers = {i: known_now.get(s) for i, s in asked.items()}  # a model is no tile: None
    return [found[i] for i in range(len(running))]
