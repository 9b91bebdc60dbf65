"""Checkpoints merged with the coefficients of a trained Portland, as its engine merges them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import neulig_fast as nf
from neulig_fast.demo import llamas
from neulig_fast.neulig import Head, NeuLig

from .test_merge_methods import refusal

VECTORS = {"cars": [0.7, 0.2, 0.1], "dogs": [0.1, 0.1, 0.8]}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 5), nn.BatchNorm1d(5)


@pytest.fixture
def engine(tmp_path: Path) -> NeuLig:
    """Saved in ``engine``, and its experts as checkpoints by their names."""
    torch.manual_seed(3)
    experts = {name: Encoder() for name in ("a", "b", "c")}
    for name, expert in experts.items():
        llamas.write(tmp_path / name, expert.state_dict(), torch.float32, shards=1)
    pool = nf.ExpertPool(list(experts.values()), names=list(experts))
    found = NeuLig(pool, {task: Head(torch.randn(2, 5)) for task in (*VECTORS, "owls")})
    found.calibration = {t: torch.tensor(v, dtype=torch.float64) for t, v in VECTORS.items()}
    found.save(tmp_path / "engine")
    return found


def recipe(folder: Path, names: str = "abc", **ours: Any) -> dict[str, Any]:
    given = {"portland": str(folder / "engine"), "dataset": "cars"} | ours
    return {
        "merge_method": "neulig",
        "models": [{"model": str(folder / name)} for name in names],
        "neulig_fast": {key: value for key, value in given.items() if value is not None},
    }


def merged(folder: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    nf.merge(config, folder / "out")
    return llamas.load(folder / "out")


@pytest.mark.parametrize("task", VECTORS)
def test_the_result_is_the_engines(tmp_path: Path, engine: NeuLig, task: str) -> None:
    got = merged(tmp_path, recipe(tmp_path, dataset=task))
    states = [llamas.load(tmp_path / name) for name in "abc"]
    for name, tensor in engine.merge("dataset", task=task).items():
        if tensor.is_floating_point():
            exact = sum(w * s[name].double() for w, s in zip(VECTORS[task], states, strict=True))
            torch.testing.assert_close(got[name].double(), exact, rtol=0, atol=2e-7)
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=2e-7)
        else:
            assert torch.equal(got[name], tensor)
    manifest = json.loads((tmp_path / "out/merge_manifest.json").read_text())
    assert manifest["recipe"]["coefficients"] == VECTORS[task]


def test_another_portland_is_another_merge(tmp_path: Path, engine: NeuLig) -> None:
    config = recipe(tmp_path)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nf.merge(config, tmp_path / "out", threads=1, progress=stop)
    engine.calibration["cars"] = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    engine.save(tmp_path / "engine")
    assert "an interrupted merge that differs in coefficients" in refusal(
        lambda: merged(tmp_path, config)
    )


@pytest.mark.parametrize(
    ("names", "ours", "part"),
    [
        ("ab", {}, "was trained for 3 experts (a, b, c), the recipe has 2 models"),
        ("acb", {}, "has the experts in the order a, b, c, the recipe a, c, b"),
        ("abc", {"dataset": "car"}, "has no data set 'car'; did you mean 'cars'?"),
        ("abc", {"dataset": "zebras"}, "no data set 'zebras' (known: cars, dogs)"),
        ("abc", {"dataset": "owls"}, "no calibration vector for 'owls' (known: cars, dogs)"),
        ("abc", {"dataset": None}, "neulig_fast.dataset: must be text, got None"),
        ("abc", {"portland": None}, "neulig_fast.portland: must be text, got None"),
        ("abc", {"portland": "./nowhere"}, "neulig_fast.portland: ./nowhere: no such folder"),
    ],
)
def test_what_cannot_be(
    tmp_path: Path, engine: NeuLig, names: str, ours: dict[str, Any], part: str
) -> None:
    assert part in refusal(lambda: merged(tmp_path, recipe(tmp_path, names, **ours)))


def test_folders_that_are_no_engine(tmp_path: Path, engine: NeuLig) -> None:
    text = refusal(lambda: merged(tmp_path, recipe(tmp_path, portland=str(tmp_path / "a"))))
    assert "neulig_fast.portland" in text and "holds no saved engine" in text
    (state,) = (tmp_path / "engine").glob("state-*.safetensors")
    data = bytearray(state.read_bytes())
    data[-1] ^= 1
    state.write_bytes(data)
    assert "is damaged" in refusal(lambda: merged(tmp_path, recipe(tmp_path)))


def test_other_weights_and_other_methods(tmp_path: Path, engine: NeuLig) -> None:
    config = recipe(tmp_path)
    config["models"][0]["parameters"] = {"weight": 1}
    assert "the recipe must have none" in refusal(lambda: merged(tmp_path, config))
    other = recipe(tmp_path) | {"merge_method": "linear", "parameters": {"weight": 1}}
    text = refusal(lambda: merged(tmp_path, other))
    assert "neulig_fast.portland: only neulig reads it" in text
    assert "neulig_fast.dataset: only neulig reads it" in text
