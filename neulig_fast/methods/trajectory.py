"""Means of the checkpoints of one run, theta_0 to theta_{n-1} in the order of the recipe.

    ema   e_0 = theta_0, e_i = decay e_{i-1} + (1 - decay) theta_i; the last one
    wsm   the mean with weights f(i / n) - f((i + 1) / n), which sum to 1

The steps between checkpoints i - 1 and i are in the mean as often as the weights from i on sum to:
f(i / n). So a learning rate that was constant is decayed afterwards as the ``schedule`` says:

    linear   f(x) = 1 - x: all weigh the same, as in LAWA
    1-sqrt   f(x) = 1 - sqrt(x)
    cosine   f(x) = (1 + cos(pi x)) / 2

Sources: Tian et al., "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM
Pre-training", arXiv 2507.17634; Kaddour, "Stop Wasting My Time! Saving Days of ImageNet and BERT
Training with Latest Weight Averaging", 2022; Polyak and Juditsky, 1992.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import cos, pi, sqrt

from ._method import Apply, Method, Parameter, Task
from .linear import blended

SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - sqrt(x),
    "cosine": lambda x: (1 + cos(pi * x)) / 2,
}


def ema_weights(models: int, decay: float) -> list[float]:
    """Of every model in their exponential moving average."""
    first, *others = (decay ** (models - 1 - i) for i in range(models))
    return [first, *((1 - decay) * power for power in others)]


def wsm_weights(models: int, schedule: str) -> list[float]:
    """Of every model in a mean that has the effect of a learning rate's schedule."""
    left = [SCHEDULES[schedule](i / models) for i in range(models + 1)]
    return [left[i] - left[i + 1] for i in range(models)]


def _ema(task: Task, _: None) -> Apply:
    return blended(ema_weights(task.models, task.value("decay")))


def _wsm(task: Task, _: None) -> Apply:
    return blended(wsm_weights(task.models, task.value("schedule")))


METHODS = (
    Method(
        name="ema",
        title="Exponential moving average",
        source="Polyak and Juditsky, 1992",
        parameters={"decay": Parameter(None, low=0, high=1)},
        apply=_ema,
    ),
    Method(
        name="wsm",
        title="WSM",
        source="Tian et al., arXiv 2507.17634",
        parameters={"schedule": Parameter("linear", kind=str, words=tuple(SCHEDULES))},
        apply=_wsm,
    ),
)
