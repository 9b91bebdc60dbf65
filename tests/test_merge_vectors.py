"""Spherical methods that go by rows or columns; mergekit's results on them are in data/mergekit."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from neulig_fast.checkpoints import tiles
from neulig_fast.methods import BLOCK

from .test_merge_methods import close, merged, normal, of_one, recipe, refusal, write

WAYS = {
    "rows": ("nuslerp", {"nuslerp_flatten": False}),
    "columns": ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "filters": ("model_stock", {"filter_wise": True}),
}


def vectors(d: np.ndarray, way: str) -> np.ndarray:
    """(N, V, L) of tensors (N, *shape)."""
    if way == "columns":
        return np.moveaxis(d.reshape(len(d), d.shape[1], -1), 1, 2)
    return d.reshape(len(d), -1, d.shape[-1])


def oracle(d: np.ndarray, way: str) -> np.ndarray:
    """By vectors of task vectors (2, V, L) in float64; nuslerp at a quarter."""
    norms = np.linalg.norm(d, axis=2, keepdims=True)
    cosine = (d[0] * d[1]).sum(-1, keepdims=True) / np.maximum(norms[0] * norms[1], 1e-300)
    if way == "filters":
        return 2 * cosine / (1 + cosine) * d.mean(0)
    angle = np.arccos(cosine)
    return (np.sin(0.75 * angle) * d[0] + np.sin(0.25 * angle) * d[1]) / np.sin(angle)


@pytest.mark.parametrize(
    ("way", "shape"),
    [
        *itertools.product(WAYS, [(300, 700), (7, 5, 6), (BLOCK + 9,)]),
        *[("rows", (3, BLOCK + 5)), ("filters", (3, BLOCK + 5)), ("columns", (3, BLOCK - 5))],
    ],
)
def test_by_the_oracle_whatever_the_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, shape: tuple[int, ...]
) -> None:
    method, more = WAYS[way]
    states = [{"x": normal(*shape, seed=i)} for i in range(3)]
    write(tmp_path, *states)
    each = [{"weight": 0.75}, {"weight": 0.25}] if method == "nuslerp" else [{}] * 2
    config = recipe(tmp_path, method, each, **more)
    got = merged(tmp_path, config, threads=1)["x"]
    one, two, base = (s["x"].double().numpy() for s in states)
    d = vectors(np.stack([one - base, two - base]), way)
    close(
        torch.from_numpy(vectors(got[None].numpy(), way)[0]),
        vectors(base[None], way)[0] + oracle(d, way),
        4e-6,
    )
    monkeypatch.setattr(tiles, "_STREAMED", BLOCK)
    monkeypatch.setattr(
        tiles, "tile_elements", lambda planned, memory: min(BLOCK, planned.output.elements)
    )
    again = merged(tmp_path, config, threads=3, resume=False)["x"]
    assert torch.equal(got, again)


@pytest.mark.parametrize("more", [{}, {"nuslerp_flatten": False}])
def test_zeros_are_at_right_angles(tmp_path: Path, more: dict[str, bool]) -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    each = [{"weight": 1.0}, {"weight": 1.0}]
    close(of_one(tmp_path, "nuslerp", rows, each, **more), np.array([3.0, 4.0]) * np.sqrt(0.5))


@pytest.mark.parametrize("by_row", [False, True])
def test_opposite_task_vectors_leave_the_base(tmp_path: Path, by_row: bool) -> None:
    rows = torch.tensor([[3.0, -1.0], [-3.0, 1.0]])
    got = of_one(tmp_path, "model_stock", rows, [{}] * 2, filter_wise=by_row)
    assert got.tolist() == [0, 0]


def test_more_columns_than_are_kept(tmp_path: Path) -> None:
    write(tmp_path, *({"x": torch.ones(1, (1 << 16) + 1)} for _ in range(3)))
    _, more = WAYS["columns"]
    config = recipe(tmp_path, "nuslerp", [{"weight": 1}] * 2, **more)
    text = refusal(lambda: merged(tmp_path, config))
    assert "'x': nuslerp_row_wise: must have at most 65536 columns, got 65537" in text
