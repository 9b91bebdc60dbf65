"""NeuLig as a merge method of mergekit: a sum of experts with the weights that a Portland found.

merge_method: neulig
parameters:
  portland: folder      # of NeuLig.save: merge vectors of its tasks
  task: name            # whose; without one, the mean of all tasks' vectors
models: [...]           # in the order of the engine's experts, or with a weight each instead
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..._checks import did_you_mean, raise_all
from ...neulig.saving import read_vectors
from ...ops import blend_lists


def method() -> Any:
    """The method, as mergekit's registry holds it."""
    base = importlib.import_module("mergekit.merge_methods.base")
    define = importlib.import_module("mergekit.merge_methods.easy_define")

    def merge(group: Any, weight: Any = None, portland: str = "", task: str = "") -> Tensor:
        return neulig([entry.tensor for entry in group.entries], [*weight.values()], portland, task)

    # mergekit reads what a method takes from its annotations.
    given = {"weight": base.PerInput[float | None], "portland": str, "task": str}
    merge.__annotations__ = {"group": base.TensorGroup, **given, "return": Tensor}
    url = "https://arxiv.org/abs/2503.01268"
    return define.merge_method(name="neulig", pretty_name="NeuLig", reference_url=url)(merge)


def neulig(tensors: list[Tensor], weights: list[float | None], portland: str, task: str) -> Tensor:
    """The sum of tensors of one shape.

    Args:
        tensors: of N models.
        weights: of each; all None with ``portland``.
        portland, task: a folder of a saved engine, and one of its tasks or nothing.

    Raises:
        ValueError: not one of both is given, or they do not fit the models.
        FileNotFoundError: the folder holds no engine.
    """
    given = [weight for weight in weights if weight is not None]
    faults = []
    if bool(given) == bool(portland) or len(given) not in (0, len(tensors)):
        faults.append("a weight for every model, or portland, a folder, must be given")
    if task and not portland:
        faults.append(f"task {task!r} is given without portland")
    raise_all("neulig", faults)
    vector = torch.tensor(given, dtype=torch.float64)
    if portland:
        vector = _vector(portland, task, len(tensors))
    (merged,) = blend_lists(
        vector.to(tensors[0].device), [[tensor.contiguous()] for tensor in tensors]
    )
    return merged


def _vector(portland: str, task: str, models: int) -> Tensor:
    """(N,): a task's, or the mean of all."""
    _, stored = read_vectors(portland)
    known = {task: vector for task, vector in stored.items() if vector is not None}
    if not known:
        raise ValueError(f"neulig: {portland} holds no merge vectors: call fit() before save()")
    if task and task not in known:
        names = ", ".join(known)
        raise ValueError(
            f"neulig: task must be one of {names}, got {task!r}{did_you_mean(task, known)}"
        )
    vector = known[task] if task else torch.stack([*known.values()]).mean(0)
    if len(vector) != models:
        raise ValueError(f"neulig: {portland} has {len(vector)} experts, got {models} models")
    return vector
