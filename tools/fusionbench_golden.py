"""What FusionBench makes of small models: the files in tests/data/fusionbench.

    python tools/fusionbench_golden.py [FOLDER]     # in an environment with fusion_bench 0.2.33

Each recipe there is merged by FusionBench's own functions, with the values that it has for them;
for DARE they are given this project's random numbers in the place of torch's.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from neulig_fast.checkpoints.checkpoint import open_checkpoint
from neulig_fast.demo import llamas
from neulig_fast.methods import Task
from neulig_fast.ops._task_vectors import words

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "tests/data/fusionbench"
# transformers would take this project's folder of kernels for a package.
sys.path[:] = [path for path in sys.path if not (Path(path) / "neulig_fast").is_dir()]

State = dict[str, Tensor]


def random_numbers(name: str, elements: int, models: int) -> list[Tensor]:
    """Of a tensor's elements, uniform, for every model: one is kept where 1 - density is less."""
    streams = Task(name, (elements,), models, True, {}).streams()
    return [1 - words(0, 0, elements, torch.tensor(s)).double() / 2**32 for s in streams]


def of_tensors(names: Sequence[str], base: State, models: int) -> list[State]:
    """Random numbers that go by the place in each tensor."""
    found: list[State] = [{} for _ in range(models)]
    for name in names:
        numbers = random_numbers(name, base[name].numel(), models)
        for own, drawn in zip(found, numbers, strict=True):
            own[name] = drawn.view_as(base[name])
    return found


def of_model(names: Sequence[str], base: State, models: int) -> list[State]:
    """By the place in the whole model, whose tensors have the order ``names``."""
    sizes = [base[name].numel() for name in names]
    parts = (numbers.split(sizes) for numbers in random_numbers("", sum(sizes), models))
    return [{n: x.view_as(base[n]) for n, x in zip(names, part, strict=True)} for part in parts]


def drop(recipe: dict[str, Any], deltas: list[State], numbers: list[State]) -> list[State]:
    from fusion_bench.method.dare.utils import param_random_drop_

    parameters = recipe["parameters"]
    for delta, own in zip(deltas, numbers, strict=True):
        for name, tensor in delta.items():
            with patch("torch.rand_like", lambda _, drawn=own[name]: drawn):
                param_random_drop_(tensor, 1 - parameters["density"], parameters["rescale"])
    return deltas


def merged(recipe: dict[str, Any], base: State, models: list[State], names: Sequence[str]) -> State:
    from fusion_bench.method.emr_merging.utils import emr_merge
    from fusion_bench.method.ties_merging import ties_merging_utils as ties
    from fusion_bench.utils.state_dict_arithmetic import (
        state_dict_add,
        state_dict_sub,
        state_dict_sum,
    )

    parameters = recipe["parameters"]
    scale = parameters.get("lambda", 1.0)
    deltas = [state_dict_sub(model, base) for model in models]
    if recipe["merge_method"] == "emr":
        unified, _, _ = emr_merge(deltas)
        return state_dict_add(base, {name: scale * delta for name, delta in unified.items()})
    if recipe["merge_method"] == "dare_linear":
        deltas = drop(recipe, deltas, of_tensors(names, base, len(models)))
        change = state_dict_sum(deltas)
        return state_dict_add(base, {name: scale * delta for name, delta in change.items()})
    if recipe["merge_method"] == "task_arithmetic":
        return {n: t + scale * sum(delta[n] for delta in deltas) for n, t in base.items()}
    share = parameters["density"]
    if recipe["merge_method"] == "dare_ties":
        deltas = drop(recipe, deltas, of_model(names, base, len(models)))
        share = parameters["threshold"]
    flat = ties.state_dict_to_vector(base)
    vectors = torch.vstack([ties.state_dict_to_vector(delta) for delta in deltas])
    change = ties.ties_merging(vectors, share, parameters["merge_func"])
    return dict(ties.vector_to_state_dict(flat + scale * change, base))


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        states = llamas.fusionbench_family(Path(name))
        names = list(open_checkpoint(Path(name) / "base").entries)
    base = states.pop("base")
    for recipe in sorted(RECIPES.glob("*.yml")):
        state = merged(yaml.safe_load(recipe.read_text()), base, list(states.values()), names)
        save_file(
            {n: t.contiguous() for n, t in state.items()}, folder / f"{recipe.stem}.safetensors"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RECIPES)
