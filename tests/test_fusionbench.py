"""FusionBench's results on the same recipes, and what its formulas say of zeros.

They are kept in data/fusionbench (tools/fusionbench_golden.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import neulig_fast as nf
from neulig_fast.demo import llamas

from .test_merge_methods import coarse, merged, recipe, write

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests/data/fusionbench"
RECIPES = sorted(path.stem for path in DATA.glob("*.yml"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    llamas.fusionbench_family(root)
    return root


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_recipe_gives_the_same_model(models: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(DATA / f"{name}.yml", models)
    report = nf.merge(models / f"{name}.yml", tmp_path / "out")
    assert report.warnings == ()
    got, wanted = llamas.load(tmp_path / "out"), load_file(DATA / f"{name}.safetensors")
    assert got.keys() == wanted.keys()
    for tensor, value in wanted.items():
        close = torch.allclose(got[tensor], value, rtol=1e-6, atol=1e-6)
        assert close, f"{tensor}: {(got[tensor] - value).abs().max()}"


@pytest.mark.slow
@pytest.mark.skipif(
    "fusion_bench" not in packages_distributions(), reason="FusionBench is not installed"
)
def test_the_kept_results_are_fusionbenchs(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "tools/fusionbench_golden.py", tmp_path]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    for name in RECIPES:
        got, kept = (load_file(f / f"{name}.safetensors") for f in (tmp_path, DATA))
        assert all(torch.equal(got[tensor], value) for tensor, value in kept.items())


# -- zeros ----------------------------------------------------------------------------------------


def oracle(d: np.ndarray, density: float, merge_func: str) -> np.ndarray:
    """Of task vectors (N, P), by sorting."""
    n = d.shape[1]
    rank = min(int(density * n), n - 1)
    least = -np.sort(-np.abs(d), axis=1)[:, rank : rank + 1]
    v = np.where(np.abs(d) >= least, d, 0)
    signs = np.sign(v.sum(0))
    signs[signs == 0] = np.sign(signs.sum())
    agrees = v * np.where(signs > 0, 1, -1) > 0
    if merge_func == "max":
        return np.abs(v * agrees).max(0) * signs
    total = (v * agrees).sum(0)
    return total / np.maximum(agrees.sum(0), 1) if merge_func == "mean" else total


CANCELLING = {
    "plus": [[1.0, 3.0, 2.0, -1.0, 2.0], [-1.0, 0.0, 2.0, -1.0, 1.0]],
    "minus": [[1.0, -3.0, 2.0, -1.0, -2.0], [-1.0, 0.0, 2.0, -1.0, -1.0]],
    "none": [[1.0, -3.0, 2.0, 0.0, 0.0], [-1.0, 0.0, 2.0, 0.0, 0.0]],
}


@pytest.mark.parametrize("merge_func", ["sum", "mean", "max"])
@pytest.mark.parametrize("name", CANCELLING)
def test_sums_of_zero_have_the_sign_of_all_signs(
    tmp_path: Path, name: str, merge_func: str
) -> None:
    d = np.array(CANCELLING[name])
    one, two = ({"x": torch.tensor(r[:2]), "y": torch.tensor(r[2:])} for r in CANCELLING[name])
    write(tmp_path, one, two, {n: torch.zeros_like(t) for n, t in one.items()})
    config = recipe(
        tmp_path, "ties", [{"weight": 1}] * 2, parity="fusionbench", merge_func=merge_func
    )
    got = merged(tmp_path, config)
    wanted = oracle(d, 1.0, merge_func)
    assert [*got["x"].tolist(), *got["y"].tolist()] == wanted.tolist()


@pytest.mark.parametrize("scope", ["model", "tensor"])
@pytest.mark.parametrize("density", [0.0, 0.3, 0.95, 1.0])
def test_thresholds_keep_all_that_equal_them(tmp_path: Path, density: float, scope: str) -> None:
    states = [{n: coarse(3, 11, seed=9 * i + len(n)) for n in ("x", "xy")} for i in range(4)]
    write(tmp_path, *states)
    config = recipe(tmp_path, "ties", [{"weight": 1, "density": density}] * 3)
    config["parameters"] = {"merge_func": "mean"}
    config["neulig_fast"] = {"parity": "fusionbench", "scope": scope}
    got = merged(tmp_path, config)
    parts = [["x"], ["xy"]] if scope == "tensor" else [["x", "xy"]]
    for names in parts:
        base, *d = (
            np.concatenate([s[n].double().numpy().ravel() for n in names])
            for s in (states[-1], *states[:-1])
        )
        wanted = base + oracle(np.stack([x - base for x in d]), density, "mean")
        found = np.concatenate([got[n].double().numpy().ravel() for n in names])
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_what_a_parity_does_not_read_is_said(tmp_path: Path) -> None:
    write(tmp_path, {"x": torch.ones(3)}, {"x": torch.zeros(3)})

    def warned(**more: Any) -> str:
        config = recipe(tmp_path, "ties", [{"weight": 1}], **more)
        return "\n".join(nf.merge(config, tmp_path / "out").warnings)

    assert "parameters.normalize: not read with parity fusionbench" in warned(
        parity="fusionbench", normalize=True
    )
    assert "parameters.merge_func: not read with parity mergekit" in warned(merge_func="sum")
    assert warned(parity="fusionbench", merge_func="max") == ""


def test_masks_of_consensus_ask_for_more(tmp_path: Path) -> None:
    """|d| = 1 = 0.5 |3 - 1|, for both experts' second element."""
    rows = [{"x": torch.tensor([4.0, 1.0])}, {"x": torch.tensor([4.0, 2.0])}]
    write(tmp_path, *rows, {"x": torch.zeros(2)})
    each = [{"tall_mask_lambda": 0.5}] * 2
    assert merged(tmp_path, recipe(tmp_path, "consensus", each))["x"].tolist() == [8, 3]
    other = recipe(tmp_path, "consensus", each, parity="fusionbench")
    assert merged(tmp_path, other)["x"].tolist() == [8, 0]
