"""What a model's NaN or infinity does to a merge: it stays in its tensor, mostly at its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import neulig_fast as nf
from neulig_fast.demo import llamas
from neulig_fast.methods import METHODS

NAME, PLACE = "model.layers.0.mlp.up_proj.weight", 7
# Per model, per merge, and how many models beside the base.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "linear": ({"weight": 0.4}, {}, 3),
    "passthrough": ({}, {}, 1),
    "task_arithmetic": ({"weight": 0.4}, {}, 3),
    "ties": ({"weight": 0.4, "density": 0.5}, {}, 3),
    "dare_linear": ({"weight": 0.4, "density": 0.5}, {}, 3),
    "dare_ties": ({"weight": 0.4, "density": 0.5}, {}, 3),
    "breadcrumbs": ({"weight": 0.4, "density": 0.5, "gamma": 0.1}, {}, 3),
    "breadcrumbs_ties": ({"weight": 0.4, "density": 0.5, "gamma": 0.1}, {}, 3),
    "slerp": ({}, {"t": 0.3}, 1),
    "nuslerp": ({"weight": 0.4}, {}, 2),
    "multislerp": ({"weight": 0.4}, {}, 3),
    "karcher": ({}, {}, 3),
    "model_stock": ({}, {}, 3),
    "sce": ({}, {"select_topk": 0.5}, 3),
    "nearswap": ({}, {"t": 0.001}, 1),
    "wise_ft": ({}, {"alpha": 0.3}, 1),
    "della": ({"weight": 0.4, "density": 0.5}, {"epsilon": 0.1}, 3),
    "della_linear": ({"weight": 0.4, "density": 0.5}, {"epsilon": 0.1}, 3),
    "ram": ({}, {}, 3),
    "ramplus_tl": ({}, {}, 3),
    "arcee_fusion": ({}, {}, 1),
    "consensus": ({}, {}, 3),
    "emr": ({}, {}, 3),
    "ema": ({}, {"decay": 0.5}, 3),
    "wsm": ({}, {}, 3),
    "fisher": ({}, {}, 2),
    "pcb": ({"density": 0.3}, {}, 3),
}
OTHERS = sorted(set(METHODS) - {"neulig"})  # linear, with other weights (test_merge_portland.py)
PLACEWISE = ("linear", "passthrough", "task_arithmetic", "ties", "nearswap", "wise_ft")


def merged(folder: Path, method: str, value: float | None) -> dict[str, Tensor]:
    each, parameters, count = SETTINGS[method]
    for i, name in enumerate(["base", *(f"m{k}" for k in range(count))]):
        state = llamas.tensors(i)
        if name == "m0" and value is not None:
            state[NAME].view(-1)[PLACE] = value
        llamas.write(folder / name, state, torch.float32)
    models = [{"model": str(folder / f"m{k}"), "parameters": dict(each)} for k in range(count)]
    for model in models if method == "fisher" else ():
        llamas.write(folder / "fisher", {n: t.square() for n, t in llamas.tensors(9).items()})
        model["parameters"]["fisher"] = str(folder / "fisher")
    config = {"merge_method": method, "models": models, "parameters": parameters}
    if METHODS[method].base != "one more" or method in ("slerp", "nearswap"):
        config["base_model"] = str(folder / "base")
    if METHODS[method].scopes:
        config["neulig_fast"] = {"scope": "tensor"}  # what is known of the model depends on it
    out = folder / "out"
    nf.merge(config, out)
    return llamas.load(out)


@pytest.mark.parametrize("method", OTHERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_it_stays_in_its_tensor(tmp_path: Path, method: str, value: float) -> None:
    clean = merged(tmp_path / "clean", method, None)
    result = merged(tmp_path / "other", method, value)
    for name, tensor in result.items():
        if name != NAME:
            assert torch.equal(tensor, clean[name]), name
    if method == "nearswap" and value == torch.inf:
        assert result[NAME].isfinite().all()  # a step towards it
    elif method in PLACEWISE:
        bad = (~result[NAME].isfinite()).view(-1).nonzero().flatten().tolist()
        assert bad == [PLACE]
