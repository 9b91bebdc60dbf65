"""mergekit's results on the same recipes, kept in data/mergekit (tools/mergekit_golden.py)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import neulig_fast as nf
from neulig_fast.demo import llamas

DATA = Path(__file__).parent / "data/mergekit"
RECIPES = sorted(path.stem for path in DATA.glob("*.yml"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    llamas.mergekit_family(root)
    return root


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_recipe_gives_the_same_model(models: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(DATA / f"{name}.yml", models)
    nf.merge(models / f"{name}.yml", tmp_path / "out")
    got, wanted = llamas.load(tmp_path / "out"), load_file(DATA / f"{name}.safetensors")
    assert got.keys() == wanted.keys()
    for tensor, value in wanted.items():
        assert got[tensor].dtype == value.dtype
        # fp32 on both sides; sums of hundreds of products differ in their order.
        close = torch.allclose(got[tensor], value, rtol=2e-5, atol=2e-6)
        assert close, f"{tensor}: {(got[tensor] - value).abs().max()}"
