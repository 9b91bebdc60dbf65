"""Methods that see a whole model as one tensor: thresholds of the model, not of its tensors.

Against NumPy on the vector of all tensors, in fp64 and by sorting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import neulig_fast as nf
from neulig_fast.checkpoints import pipeline, tiles
from neulig_fast.checkpoints.forecast import passes
from neulig_fast.checkpoints.manifest import verify
from neulig_fast.checkpoints.merging import foresee
from neulig_fast.checkpoints.prepared import prepare
from neulig_fast.checkpoints.write import Staging
from neulig_fast.demo import llamas
from neulig_fast.methods import BLOCK

from .test_merge_methods import close, coarse, refusal, write

SHAPES = {"a": (6, 9), "b": (0, 4), "cube": (2, 3, 4), "one": (1,), "v": (40,)}
NAN = float("nan")


def states(count: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> list[dict[str, Tensor]]:
    """The last one is the base. Magnitudes of tensors differ: a threshold of each is another."""
    found = []
    for i in range(count):
        state = {
            n: coarse(*s, seed=31 * i + k) * (1 + k) for k, (n, s) in enumerate(shapes.items())
        }
        found.append(state | {"ids": torch.arange(3)})
    return found


def recipe(folder: Path, method: str, each: Any, ours: Any = None, **more: Any) -> dict[str, Any]:
    models = [{"model": str(folder / f"m{i}"), "parameters": own} for i, own in enumerate(each)]
    return {
        "merge_method": method,
        "models": models,
        "base_model": str(folder / "base"),
        "parameters": more,
        "neulig_fast": {"scope": "model"} | (ours or {}),
    }


def merged(folder: Path, config: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
    nf.merge(config, folder / "out", **options)
    verify(folder / "out")
    return llamas.load(folder / "out")


def order(folder: Path) -> list[str]:
    """Names of floats in the order of the base's file."""
    (file,) = (folder / "base").glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        names = opened.offset_keys()
        return [n for n in names if opened.get_tensor(n).is_floating_point()]


def vector(state: Mapping[str, Tensor], names: list[str]) -> np.ndarray:
    return np.concatenate([state[name].double().numpy().ravel() for name in names])


def kept(d: np.ndarray, first: int, count: int) -> np.ndarray:
    """Without the ``first`` largest the ``count`` largest; of equal ones the earlier is larger."""
    mask = np.zeros(d.shape, dtype=bool)
    mask[np.argsort(-np.abs(d), kind="stable")[first : first + count]] = True
    return np.where(mask, d, 0)


def elected(v: np.ndarray, w: np.ndarray) -> np.ndarray:
    """TIES' merge of trimmed task vectors (N, P), the mean by weights."""
    agrees = v * np.where((w[:, None] * v).sum(0) < 0, -1, 1) > 0
    total = (w[:, None] * v * agrees).sum(0)
    return total / np.where(agrees.any(0), (w[:, None] * agrees).sum(0), 1)


def in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one block, whatever the memory."""
    monkeypatch.setattr(tiles, "_STREAMED", BLOCK)
    monkeypatch.setattr(
        tiles, "tile_elements", lambda planned, memory: min(BLOCK, planned.output.elements)
    )


# -- what is found --------------------------------------------------------------------------------

DENSITIES = [0.1, 0.37, 0.8]
EACH = [{"weight": w, "density": d} for w, d in zip((0.5, 1.5, 1.0), DENSITIES, strict=True)]


def test_ties_trims_the_whole_model(tmp_path: Path) -> None:
    models = states(4)
    write(tmp_path, *models)
    names = order(tmp_path)
    base = vector(models[-1], names)
    d = np.stack([vector(m, names) for m in models[:3]]) - base
    v = np.stack([kept(x, 0, int(s * len(base))) for x, s in zip(d, DENSITIES, strict=True)])
    wanted = base + 0.7 * elected(v, np.array([0.5, 1.5, 1.0]))
    got = merged(tmp_path, recipe(tmp_path, "ties", EACH, **{"lambda": 0.7}))
    close(torch.from_numpy(vector(got, names)), wanted, 1e-6)
    by_tensor = merged(tmp_path, recipe(tmp_path, "ties", EACH, {"scope": "tensor"}))
    assert not np.allclose(vector(by_tensor, names), wanted)
    assert torch.equal(got["ids"], models[-1]["ids"])


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_breadcrumbs_drops_outliers_of_the_model(tmp_path: Path, method: str) -> None:
    models = states(3)
    write(tmp_path, *models)
    names = order(tmp_path)
    base = vector(models[-1], names)
    n = len(base)
    each = [{"weight": 0.5, "density": 0.4, "gamma": 0.2}, {"weight": 2, "density": 0.1}]
    got = merged(tmp_path, recipe(tmp_path, method, each, gamma=0.05))
    cut = [(int(0.2 * n), int(0.4 * n)), (int(0.05 * n), int(0.1 * n))]
    d = [vector(m, names) - base for m in models[:2]]
    v = np.stack([kept(x, *each) for x, each in zip(d, cut, strict=True)])
    w = np.array([[0.5], [2]])
    if method == "breadcrumbs_ties":
        v = v * (v * np.where((w * v).sum(0) < 0, -1, 1) > 0)
    close(torch.from_numpy(vector(got, names)), base + (w * v).sum(0), 1e-6)


def test_ramplus_counts_in_the_whole_model(tmp_path: Path) -> None:
    d = [
        {"x": torch.tensor([4.0, 2.0]), "y": torch.tensor([3.0])},
        {"x": torch.tensor([0.0, 4.0]), "y": torch.tensor([1.0])},
    ]
    write(tmp_path, *d, {n: torch.zeros_like(t) for n, t in d[0].items()})
    got = merged(tmp_path, recipe(tmp_path, "ramplus_tl", [{}] * 2, epsilon=0.5, r=0.5, alpha=10))
    assert got["x"].tolist() == [4 * (1 + 0.5 * 2), 3.0]  # shared: one in x and one in y
    assert got["y"].tolist() == [2.0]


def test_rescaling_is_of_the_whole_model(tmp_path: Path) -> None:
    models = states(2)
    write(tmp_path, *models)
    names = order(tmp_path)
    got = merged(tmp_path, recipe(tmp_path, "ties", [{"weight": 1, "density": 0.3}], rescale=True))
    base = vector(models[-1], names)
    d = vector(models[0], names) - base
    assert np.abs(vector(got, names) - base).sum() == pytest.approx(np.abs(d).sum(), rel=1e-6)


def test_a_model_of_one_tensor_is_that_tensor(tmp_path: Path) -> None:
    write(tmp_path, *states(3, {"x": (31, 7)}))
    config = recipe(tmp_path, "ties", [{"weight": 1.0, "density": 0.2}] * 2)
    got = merged(tmp_path, config)["x"]
    assert torch.equal(got, merged(tmp_path, config | {"neulig_fast": {"scope": "tensor"}})["x"])


def test_types_are_compared_in_the_widest(tmp_path: Path) -> None:
    """1 + 2^-40 is above 1 in fp64, and the other tensor's 1 is not kept."""
    rows = {"x": torch.tensor([1 + 2.0**-40, 0.0], dtype=torch.float64), "y": torch.ones(2)}
    for name, state in (("m0", rows), ("base", {n: torch.zeros_like(t) for n, t in rows.items()})):
        (tmp_path / name).mkdir()
        save_file(state, tmp_path / name / "model.safetensors")
    got = merged(tmp_path, recipe(tmp_path, "ties", [{"weight": 1, "density": 0.25}]))
    assert got["x"].tolist() == [1 + 2.0**-40, 0] and got["y"].tolist() == [0, 0]
    assert got["x"].dtype == torch.float64 and got["y"].dtype == torch.float32


def test_thresholds_of_fp64_are_not_rounded(tmp_path: Path) -> None:
    row = torch.tensor([1.0, 1 + 2.0**-40, 1 + 2.0**-41], dtype=torch.float64)
    write(tmp_path, {"x": row}, {"x": row * 0}, dtype=torch.float64)
    for scope in ("tensor", "model"):
        config = recipe(tmp_path, "ties", [{"weight": 1, "density": 0.34}], {"scope": scope})
        assert merged(tmp_path, config)["x"].tolist() == [0, 1 + 2.0**-40, 0]


@pytest.mark.parametrize("density", [0, 1])
def test_all_or_nothing(tmp_path: Path, density: float) -> None:
    models = states(2)
    write(tmp_path, *models)
    got = merged(tmp_path, recipe(tmp_path, "ties", [{"weight": 1, "density": density}]))
    for name in SHAPES:
        assert torch.equal(got[name], models[0 if density else 1][name])


def test_nan_is_kept_and_has_no_rank(tmp_path: Path) -> None:
    rows = {"x": torch.tensor([NAN, 3.0, 1.0]), "y": torch.tensor([2.0, NAN, torch.inf])}
    write(tmp_path, rows, {n: torch.zeros_like(t) for n, t in rows.items()})
    got = merged(tmp_path, recipe(tmp_path, "ties", [{"weight": 1, "density": 0.34}]))  # 2 of 6
    assert got["x"].nan_to_num(nan=7).tolist() == [7, 3, 0]
    assert got["y"].nan_to_num(nan=7, posinf=9).tolist() == [0, 7, 9]


# -- whoever does it ------------------------------------------------------------------------------

LARGE = {"rows": (700, 100), "long": (2 * BLOCK + 7,), "small": (3, 4), "tail": (BLOCK,)}
METHODS = {
    "ties": ([{"weight": 0.7, "density": 0.3}, {"weight": 0.4, "density": 0.6}], {}),
    "breadcrumbs": ([{"weight": 0.7, "density": 0.3, "gamma": 0.1}] * 2, {"rescale": True}),
    "ramplus_tl": ([{}] * 2, {"epsilon": 1.0, "r": 0.7, "alpha": 3.0}),
    "dare_ties": (
        [{"weight": 1, "density": 0.6}, {"weight": 1, "density": 0.9}],
        {"threshold": 0.3, "merge_func": "mean", "ours": {"parity": "fusionbench"}},
    ),
}


@pytest.mark.parametrize("method", METHODS)
def test_bits_depend_on_neither_threads_nor_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    write(tmp_path, *states(3, LARGE))
    each, more = METHODS[method]
    config = recipe(tmp_path, method, each, **more)
    wanted = merged(tmp_path, config, threads=1)
    in_tiles(monkeypatch)
    got = merged(tmp_path, config, threads=3, resume=False)
    assert all(torch.equal(tensor, got[name]) for name, tensor in wanted.items())


def test_results_of_one_reading_share_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, *states(3))
    each = [{"weight": 1.0}] * 2
    sweep = {"density": [0.2, 0.5, 1], "lambda": [0.5, 1]}
    read = []
    measure = pipeline.Worker.measure

    def counted(self: Any, planned: Any, place: int, statistics: Any) -> Any:
        read.append((planned.output.name, len(statistics)))
        return measure(self, planned, place, statistics)

    monkeypatch.setattr(pipeline.Worker, "measure", counted)
    report = nf.merge(recipe(tmp_path, "ties", each, {"sweep": sweep}), tmp_path / "out")
    of_v = [count for name, count in read if name == "v"]
    assert of_v[:3] == [1, 2, 2]  # the first digit's counts are the same for every density
    assert len(of_v) <= 4
    for name, one in report.outputs.items():
        nf.merge(one.folder / "mergekit_config.yml", tmp_path / name)
        assert llamas.contents(one.folder) == llamas.contents(tmp_path / name)


def test_an_interrupted_merge_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, *states(3))
    config = recipe(tmp_path, "ties", [{"weight": 1.0, "density": 0.3}] * 2)
    nf.merge(config, tmp_path / "whole")
    record = Staging.record

    def failing(self: Staging, name: str, checksum: str) -> None:
        if len(self.sums) == 2:
            raise OSError("enough")
        record(self, name, checksum)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="enough"):
        patch.setattr(Staging, "record", failing)
        nf.merge(config, tmp_path / "out", threads=1)
    assert nf.merge(config, tmp_path / "out").resumed == 2
    assert llamas.contents(tmp_path / "out") == llamas.contents(tmp_path / "whole")


def test_passes_are_foreseen_and_progress_counts_them(tmp_path: Path) -> None:
    models = states(3, {"x": (500,), "y": (300,)})
    for i, model in enumerate(models):  # no ties: no tile is read for a cut
        torch.manual_seed(i)
        models[i] = {n: torch.randn_like(t) if n != "ids" else t for n, t in model.items()}
    write(tmp_path, *models)
    config = recipe(tmp_path, "ties", [{"weight": 1.0, "density": 0.3}] * 2)
    told: list[tuple[int, int]] = []
    report = nf.merge(config, tmp_path / "out", progress=lambda *now: told.append(now))
    once, ids = 3 * 800 * 4, 3 * 8
    assert report.bytes_in == 4 * once + ids
    assert told[-1] == (4 * once + 800 * 4 + 2 * ids,) * 2
    found = foresee(config, tmp_path / "new")  # type: ignore[arg-type]
    assert (found.passes, found.bytes_again, found.bytes_in) == (4, 0, 4 * once + ids)
    assert "(the whole model 4 times)" in str(found)
    every = recipe(tmp_path, "ties", [{"weight": 1.0}] * 2)
    assert passes([one.plan for one in prepare(every)]) == 0
    assert nf.merge(every, tmp_path / "out").bytes_in == once + ids


# -- what cannot be -------------------------------------------------------------------------------


def test_what_must_be_of_the_model(tmp_path: Path) -> None:
    write(tmp_path, *states(3))
    by_tensor = [{"filter": "cube", "value": 0.2}, {"value": 0.5}]
    each = [{"weight": by_tensor, "density": by_tensor}, {"weight": 1, "density": 0.1}]
    text = refusal(lambda: merged(tmp_path, recipe(tmp_path, "ties", each)))
    assert "density: must be the same for all tensors with neulig_fast.scope: model" in text
    assert "[0.2, 0.1] for 'cube'" in text and "[0.5, 0.1] for 'a'" in text
    assert "weight" not in text
    each[0]["density"] = 0.3
    merged(tmp_path, recipe(tmp_path, "ties", each))


def test_slices_must_have_as_many_models(tmp_path: Path) -> None:
    key = "model.layers.{}.w"
    write(tmp_path, *({key.format(i): torch.ones(2) * m for i in range(2)} for m in range(3)))
    config = recipe(tmp_path, "ties", [{"weight": 1}] * 2)
    sources = [m | {"layer_range": [0, 1]} for m in config.pop("models")]
    config["slices"] = [{"sources": sources}, {"sources": sources[:1]}]
    text = refusal(lambda: merged(tmp_path, config))
    assert "as many models in all slices, got 2 for" in text
    config["slices"][1] = {"sources": sources}
    assert merged(tmp_path, config)[key.format(1)].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("method", "scope", "part"),
    [
        ("emr", "model", "neulig_fast.scope: emr has tensor, got 'model'"),
        ("della", "model", "neulig_fast.scope: della has tensor, got 'model'"),
        ("ties", "modle", "neulig_fast.scope: ties has tensor, model, got 'modle'; did you mean"),
        ("ties", 3, "got '3'"),
    ],
)
def test_scopes_that_there_are_not(tmp_path: Path, method: str, scope: Any, part: str) -> None:
    write(tmp_path, *states(2))
    each = [{"weight": 1}]
    act: Callable[[], Any] = lambda: merged(  # noqa: E731
        tmp_path, recipe(tmp_path, method, each, {"scope": scope})
    )
    assert part in refusal(act)
