"""Passes over a whole model, by all threads of all processes: statistics of all its tensors."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..methods import Statistic
from .measured import added
from .pipeline import Job, Pipeline, Worker
from .ranks import Ranks

_WHOLE_NUMBERS = -1  # where sums lie that are the same in any order


class Survey:
    """Looks at a model for what is known of it as one tensor.

    Args:
        pipeline: reads.
        jobs: all tensors; those that are merged are looked at.
        places: where their elements begin, by name.
        ranks: each looks at its part.
    """

    def __init__(
        self, pipeline: Pipeline, jobs: Sequence[Job], places: Mapping[str, int], ranks: Ranks
    ) -> None:
        self._pipeline, self._places, self._ranks = pipeline, places, ranks
        self._jobs = [job for job in jobs if job[0].task is not None]
        self._numbers = {job[0].output.name: k for k, job in enumerate(self._jobs)}
        self._own = ranks.part(self._jobs)
        self.bytes = 0  # that were read, by all

    def look(self, statistics: Sequence[Statistic]) -> list[Any]:
        """The answers to statistics, in one pass."""
        found: list[dict[int, Any]] = [{} for _ in statistics]
        lock = threading.Lock()

        def act(worker: Worker, job: Job) -> None:
            name, place = job[0].output.name, self._places[job[0].output.name]
            answers = worker.measure(job[0], place, statistics)
            with lock:
                for parts, answer in zip(found, answers, strict=True):
                    _keep(parts, self._numbers[name], answer)
            if any(statistic.starts is None for statistic in statistics):
                self._pipeline.advance(job[0].bytes)

        def work() -> list[dict[int, Any]]:
            self._pipeline.each(self._own, act)
            return found

        if any(statistic.starts is None for statistic in statistics):
            self.bytes += sum(job[0].bytes for job in self._jobs)
        every = self._ranks.all(work)
        return [
            _answer(statistic, [ranks[k] for ranks in every])
            for k, statistic in enumerate(statistics)
        ]


def _keep(parts: dict[int, Any], number: int, answer: Any) -> None:
    """What a tensor has to tell: whole numbers are added up at once, and take no memory."""
    if isinstance(answer, Tensor) and not answer.is_floating_point():
        parts[_WHOLE_NUMBERS] = answer + parts.get(_WHOLE_NUMBERS, 0)
    else:
        parts[number] = answer


def _answer(statistic: Statistic, ranks: Sequence[Mapping[int, Any]]) -> Any:
    """Of all tensors in their order, whoever has looked at them."""
    pairs = [pair for parts in ranks for pair in parts.items()]
    ordered = [value for _, value in sorted(pairs, key=lambda pair: pair[0])]
    if statistic.over == "tiles":
        return [value for values in ordered for value in values]
    return added(None, ordered)
