"""PCB-Merging against its formula in fp64, whose quantiles are found by sorting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import neulig_fast as nf
from neulig_fast.checkpoints import tiles
from neulig_fast.checkpoints.forecast import passes
from neulig_fast.checkpoints.prepared import prepare
from neulig_fast.demo import llamas
from neulig_fast.methods import BLOCK

from .test_merge_methods import NAN, close, merged, normal, of_one, recipe, refusal, write

DENSITIES = [0.1, 0.35, 0.9]


def between(x: np.ndarray, low: float, high: float) -> np.ndarray:
    return (np.clip(x, low, high) - low) / (high - low) if high > low else np.zeros_like(x)


def oracle(d: np.ndarray, densities: list[float]) -> np.ndarray:
    """Of task vectors (N, P)."""
    n, scores = d.shape[1], []
    for own in d:
        size, m = np.sort(np.abs(own)), int(1e-4 * n)
        a = np.exp(len(d) * between(np.abs(own), size[m], size[n - 1 - m]) ** 2)
        scores.append(a * np.tanh(own * d.sum(0)))
    shares = []
    for b, density in zip(scores, densities, strict=True):
        ordered = np.sort(b)
        shares.append(between(b, ordered[min(int((1 - density) * n), n - 1)], ordered[-1]))
    s = np.stack(shares)
    return (s * d).sum(0) / np.maximum(s.sum(0), 1e-12)


SHAPES = {"a": (60, 90), "c": (3, 1), "v": (7000,)}


@pytest.mark.parametrize("scope", ["model", "tensor"])
def test_pcb_as_the_oracle_has_it(tmp_path: Path, scope: str) -> None:
    states = [{n: normal(*s, seed=7 * i + len(s)) for n, s in SHAPES.items()} for i in range(4)]
    write(tmp_path, *states)
    each = [{"density": density} for density in DENSITIES]
    config = recipe(tmp_path, "pcb", each, **{"lambda": 0.8})
    config["neulig_fast"] = {"scope": scope} if scope == "tensor" else {}  # the model is usual
    got = merged(tmp_path, config)
    for names in [[*SHAPES]] if scope == "model" else [[name] for name in SHAPES]:
        flat = [np.concatenate([s[n].double().numpy().ravel() for n in names]) for s in states]
        d = np.stack(flat[:3]) - flat[3]
        found = np.concatenate([got[n].double().numpy().ravel() for n in names])
        close(torch.from_numpy(found), flat[3] + 0.8 * oracle(d, DENSITIES), 2e-5)


def test_pcb_by_hand(tmp_path: Path) -> None:
    """Magnitudes from 1 to 2; only the second element of either is above the median score."""
    d = torch.tensor([[1.0, 2.0, -1.0], [1.0, 2.0, 1.0]])
    got = of_one(tmp_path, "pcb", d, [{"density": 0.5}] * 2)
    low, high = np.tanh(2.0), np.exp(2) * np.tanh(8.0)
    assert low < high  # shares: 0, 1 and 0 of both; the third's scores are 0
    assert got.tolist() == [0.0, 2.0, 0.0]
    got = of_one(tmp_path, "pcb", d, [{"density": 1}] * 2)
    close(got, [1.0, 2.0, 0.0], 1e-6)


@pytest.mark.parametrize("density", [0, 0.3, 1])
def test_pcb_of_hostile_tensors(tmp_path: Path, density: float) -> None:
    each = [{"density": density}] * 2
    assert of_one(tmp_path, "pcb", torch.zeros(2, 9), each).eq(0).all()
    assert of_one(tmp_path, "pcb", torch.ones(2, 9), each).eq(0).all()  # all scores are alike
    assert of_one(tmp_path, "pcb", torch.ones(2, 1), each).eq(0).all()
    against = torch.tensor([[3.0, 1.0, 2.0], [-3.0, -1.0, -2.0]])  # every sum is 0, as every score
    assert of_one(tmp_path, "pcb", against, each).eq(0).all()
    got = of_one(tmp_path, "pcb", torch.full((2, 5), NAN), each)
    assert got.isnan().all()
    rows = normal(2, 50)
    rows[0, 7] = NAN
    got = of_one(tmp_path, "pcb", rows, each)
    assert got.isnan().nonzero().tolist() == [[7]]


def test_pcb_of_scores_below_zero(tmp_path: Path) -> None:
    """The first loses everywhere: its quantile and its largest score are negative."""
    d = np.stack([np.linspace(0.1, 1, 40), -2 - np.linspace(0.5, 3, 40)])
    got = of_one(tmp_path, "pcb", torch.from_numpy(d).float(), [{"density": 0.4}] * 2)
    close(got, oracle(np.float32(d).astype(float), [0.4, 0.4]), 2e-5)


def test_bits_depend_on_neither_threads_nor_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = {"rows": (700, 100), "long": (2 * BLOCK + 7,), "small": (3, 4)}
    write(tmp_path, *({n: normal(*s, seed=i) for n, s in shapes.items()} for i in range(3)))
    for ours in ({}, {"scope": "tensor"}):
        config = recipe(tmp_path, "pcb", [{}] * 2) | {"neulig_fast": ours}
        wanted = merged(tmp_path, config, threads=1)
        with monkeypatch.context() as patch:
            patch.setattr(
                tiles,
                "tile_elements",
                lambda planned, memory: min(BLOCK, planned.output.elements),
            )
            got = merged(tmp_path, config, threads=3, resume=False)
        assert all(torch.equal(tensor, got[name]) for name, tensor in wanted.items())
    assert passes([one.plan for one in prepare(recipe(tmp_path, "pcb", [{}] * 2))]) == 6


def test_results_of_one_reading(tmp_path: Path) -> None:
    write(tmp_path, *({"x": normal(30, 40, seed=i), "y": normal(9, seed=i)} for i in range(3)))
    config: dict[str, Any] = recipe(tmp_path, "pcb", [{}] * 2)
    config["neulig_fast"] = {"sweep": {"density": [0.1, 0.4], "lambda": [0.5, 1]}}
    for name, one in nf.merge(config, tmp_path / "out").outputs.items():
        nf.merge(one.folder / "mergekit_config.yml", tmp_path / name)
        assert llamas.contents(one.folder) == llamas.contents(tmp_path / name)


def test_pcb_asks_for_two(tmp_path: Path) -> None:
    write(tmp_path, {"x": torch.ones(3)}, {"x": torch.zeros(3)})
    text = refusal(lambda: merged(tmp_path, recipe(tmp_path, "pcb", [{"density": 2}])))
    assert "pcb merges 2 to 80 models besides the base, got 1" in text


def test_nan_is_not_among_those_that_ranks_are_of(tmp_path: Path) -> None:
    d = normal(2, 5000)
    holes = torch.cat([d, torch.full((2, 3000), NAN)], dim=1)
    own = [{"density": 0.3}, {"density": 0.7}]
    got = of_one(tmp_path, "pcb", holes, own)
    assert got[5000:].isnan().all()
    close(got[:5000], oracle(d.double().numpy(), [0.3, 0.7]), 2e-5)
