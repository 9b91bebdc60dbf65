"""What is kept of tiles while a tensor is measured, and in which order it is added up."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import neulig_fast as nf
from neulig_fast import _native
from neulig_fast.checkpoints import pipeline
from neulig_fast.checkpoints.forecast import passes
from neulig_fast.checkpoints.measured import added
from neulig_fast.checkpoints.prepared import prepare
from neulig_fast.checkpoints.read import Reader
from neulig_fast.methods import BLOCK, METHODS, Method, Statistic, Task, Tile
from neulig_fast.methods._largest import magnitudes_of_rank
from neulig_fast.ops import _magnitudes

from .test_merge_methods import NAN, close, merged, normal, recipe, write
from .test_merge_scope import in_tiles


def test_blocks_are_added_one_after_the_other() -> None:
    rows = torch.tensor([1.0, 2.0**-24, 2.0**-24, 2.0**-23])  # pairs would add up to more
    wanted = torch.tensor(1.0 + 2.0**-23)
    for cut in ([4], [1, 3], [0, 2, 0, 2], [1, 1, 1, 1, 0]):
        total = None
        for part in rows.split(cut):
            total = added(total, part if len(cut) < 3 else iter(part))
        assert total is not None and torch.equal(total, wanted)
    assert added(None, iter(())) is None


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_sums_of_tiles_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    """Histograms take more than tiles do where tensors are large: one at a time is there."""
    told: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def ones(tile: Tile) -> torch.Tensor:
        nonlocal most
        most = max(most, sum(seen() is not None for seen in told))
        found = torch.ones(1, 2048, dtype=torch.int64)
        told.append(weakref.ref(found))
        return found

    def measure(task: Task) -> Any:
        counts = yield Statistic(ones)
        assert counts.tolist() == [task.elements // BLOCK] * 2048
        return counts

    def apply(task: Task, counts: Any) -> Any:
        return lambda tile, out: out.copy_(tile.rows[0])

    method = Method("tiles", "", "", apply=apply, measure=measure, of_model=())
    monkeypatch.setitem(METHODS, "tiles", method)
    in_tiles(monkeypatch)
    write(tmp_path, {"x": torch.zeros(9 * BLOCK)}, {"x": torch.zeros(1)})
    config = recipe(tmp_path, "tiles", [{}], base=False) | {"neulig_fast": {"scope": scope}}
    merged(tmp_path, config, threads=1)
    assert len(told) >= 9 and most <= 1


@pytest.mark.skipif(
    not _native.has("magnitude_select", "CPU"),
    reason="without the extension whole tensors are sorted",
)
def test_smallest_magnitudes_are_looked_for_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = normal(2, 3 * BLOCK + 5)
    rows[0, 7] = NAN
    sizes = []
    magnitudes = _magnitudes.magnitudes

    def counted(row: torch.Tensor, base: Any) -> torch.Tensor:
        sizes.append(row.numel())
        return magnitudes(row, base)

    monkeypatch.setattr(_magnitudes, "magnitudes", counted)
    n = rows.shape[1]
    task = Task("x", (n,), 2, False, {})
    steps = magnitudes_of_rank(task, [[n, 1]], lambda tile: [(tile.rows, None)])
    found, tile = None, Tile(rows, 0)
    try:
        statistic = next(steps)
        while True:
            statistic = steps.send(pipeline.answer(statistic, tile))
    except StopIteration as done:
        found = done.value
    wanted = np.sort(rows.abs().double().numpy(), axis=1)
    assert found == ((wanted[0, 0], wanted[1, -1]),)  # NumPy sorts NaN to the end
    assert sizes and max(sizes) <= BLOCK


def test_weights_of_fp64_models_are_fp64(tmp_path: Path) -> None:
    d = normal(3, 50).double() + 1e-9
    write(tmp_path, *({"x": row} for row in d), {"x": 0 * d[0]}, dtype=torch.float64)
    got = merged(tmp_path, recipe(tmp_path, "sce", [{}] * 3) | {"dtype": "float64"})["x"]
    v = d.numpy()
    agrees = np.sign(v) == np.sign(v.sum(0))
    weights = (v**2).sum(1)[:, None] * agrees
    close(got, (weights * v).sum(0) / weights.sum(0), 1e-14)


def test_elements_that_agree_are_left_out_beside_nan(tmp_path: Path) -> None:
    """Of 3 that vary one is kept; NaN takes no rank from them, nor gives one to the last two."""
    d = torch.tensor([[NAN] * 5 + [1.0, 2, 3, 2, 2], [NAN] * 5 + [2.0, 4, 6, 2, 2]])
    write(tmp_path, *({"x": row} for row in d), {"x": torch.zeros(10)})
    got = merged(tmp_path, recipe(tmp_path, "sce", [{}] * 2, select_topk=0.5))["x"]
    assert got[:5].isnan().all() and got[5:].tolist() == [0, 0, 4.5, 0, 0]


@pytest.mark.parametrize(
    ("sweep", "looks"),
    [
        ({"density": [0.3], "lambda": [0.5, 1]}, 3),
        ({"density": [0.2, 0.5, 1.0]}, 6),
        ({"density": [1.0]}, 0),
    ],
)
def test_reading_again_for_several_results_is_foreseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep: Any, looks: int
) -> None:
    """Of a tensor that does not fit; tiles that are looked at for a tie are read besides."""
    n, seen = 2 * BLOCK, 0
    write(tmp_path, *({"x": normal(n, seed=i)} for i in range(3)))
    config = recipe(tmp_path, "ties", [{"weight": 1}] * 2) | {"neulig_fast": {"sweep": sweep}}
    assert passes([one.plan for one in prepare(config)]) == looks
    in_tiles(monkeypatch)
    read = Reader.read

    def counted(self: Reader, entry: Any, start: int, into: torch.Tensor, *more: Any) -> None:
        nonlocal seen
        seen += into.numel()
        read(self, entry, start, into, *more)

    monkeypatch.setattr(Reader, "read", counted)
    nf.merge(config, tmp_path / "out", threads=1)
    assert seen // (3 * n) == looks + 1


def test_progress_ends_at_its_end_after_passes_that_were_not_foreseen(tmp_path: Path) -> None:
    """In small models PCB's lower quantile is the smallest magnitude, which is looked for."""
    write(tmp_path, *({"x": normal(50, seed=i)} for i in range(3)))
    told: list[tuple[int, int]] = []
    config = recipe(tmp_path, "pcb", [{}] * 2)
    report = nf.merge(config, tmp_path / "out", progress=lambda *now: told.append(now))
    assert report.bytes_in == 8 * 3 * 50 * 4  # 1 + 6 + 1
    assert told[-1] == (report.bytes_in + report.bytes_out,) * 2
