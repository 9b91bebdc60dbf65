"""What FusionBench makes of small models: the files in tests/data/fusionbench.

    python tools/fusionbench_golden.py [FOLDER]     # in an environment with fusion_bench 0.2.33

Each recipe there is merged by FusionBench's own functions, with the values that it has for them.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from neulig_fast.demo import llamas

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "tests/data/fusionbench"
# transformers would take this project's folder of kernels for a package.
sys.path[:] = [path for path in sys.path if not (Path(path) / "neulig_fast").is_dir()]

State = dict[str, Tensor]


def merged(recipe: dict[str, Any], base: State, models: list[State]) -> State:
    from fusion_bench.method.emr_merging.utils import emr_merge
    from fusion_bench.method.ties_merging import ties_merging_utils as ties
    from fusion_bench.utils.state_dict_arithmetic import state_dict_add, state_dict_sub

    parameters = recipe["parameters"]
    scale = parameters.get("lambda", 1.0)
    deltas = [state_dict_sub(model, base) for model in models]
    if recipe["merge_method"] == "emr":
        unified, _, _ = emr_merge(deltas)
        return state_dict_add(base, {name: scale * delta for name, delta in unified.items()})
    if recipe["merge_method"] == "task_arithmetic":
        return {n: t + scale * sum(delta[n] for delta in deltas) for n, t in base.items()}
    flat = ties.state_dict_to_vector(base)
    vectors = torch.vstack([ties.state_dict_to_vector(model) for model in models]) - flat
    change = ties.ties_merging(vectors, parameters["density"], parameters["merge_func"])
    return dict(ties.vector_to_state_dict(flat + scale * change, base))


def main(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        states = llamas.fusionbench_family(Path(name))
    base = states.pop("base")
    for recipe in sorted(RECIPES.glob("*.yml")):
        state = merged(yaml.safe_load(recipe.read_text()), base, list(states.values()))
        save_file(
            {n: t.contiguous() for n, t in state.items()}, folder / f"{recipe.stem}.safetensors"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else RECIPES)
