"""EMR's masks beside a merge, and the experts that are made from them: the formula in fp64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import neulig_fast as nf
from neulig_fast.checkpoints import tiles
from neulig_fast.checkpoints.manifest import verify
from neulig_fast.checkpoints.write import Staging
from neulig_fast.demo import llamas
from neulig_fast.methods import BLOCK

from .test_merge_methods import NAN, coarse, merged, normal, recipe, refusal, write

SHAPES = {"a": (6, 9), "cube": (2, 3, 4), "one": (1,), "v": (4099,)}
FILE = "emr_masks.safetensors"


def states(count: int, rounded: bool = False) -> list[dict[str, Tensor]]:
    draw = coarse if rounded else normal
    return [
        {n: draw(*s, seed=9 * i + k) for k, (n, s) in enumerate(SHAPES.items())}
        | {"ids": torch.arange(3)}
        for i in range(count)
    ]


def oracle(models: list[Any], base: dict[str, Tensor]) -> list[dict[str, np.ndarray]]:
    """Every expert's model: masks, scales and union, of all tensors."""
    d = {
        n: np.stack([m[n].double().numpy() - base[n].double().numpy() for m in models])
        for n in SHAPES
    }
    sign = {n: np.where(x.sum(0) > 0, 1, -1) for n, x in d.items()}
    kept = {n: x * sign[n] > 0 for n, x in d.items()}
    union = {n: sign[n] * np.where(kept[n], np.abs(x), 0).max(0) for n, x in d.items()}
    found = []
    for i in range(len(models)):
        own = sum(np.abs(d[n][i]).mean() for n in SHAPES)
        scale = own / sum(np.abs(kept[n][i] * union[n]).mean() for n in SHAPES)
        found.append({n: base[n].double().numpy() + scale * kept[n][i] * union[n] for n in SHAPES})
    return found


def emr(folder: Path, count: int, **more: Any) -> dict[str, Any]:
    return recipe(folder, "emr", [{}] * count, **more)


@pytest.mark.parametrize("lam", [1.0, 0.3])
@pytest.mark.parametrize("rounded", [True, False])
def test_experts_are_the_formulas(tmp_path: Path, rounded: bool, lam: float) -> None:
    *models, base = states(4, rounded)
    write(tmp_path, *models, base)
    nf.merge(emr(tmp_path, 3, **{"lambda": lam}), tmp_path / "out", shard_size=4000)
    for i, wanted in enumerate(oracle(models, base)):
        got = nf.emr_expert(tmp_path / "out", i)
        assert got.keys() == {*SHAPES, "ids"} and torch.equal(got["ids"], base["ids"])
        for name in SHAPES:
            assert got[name].shape == base[name].shape
            np.testing.assert_allclose(got[name].double().numpy(), wanted[name], rtol=0, atol=2e-6)
    named = nf.emr_expert(tmp_path / "out", "m1", tmp_path / "base")
    again = nf.emr_expert(tmp_path / "out", 1)
    assert all(torch.equal(named[name], again[name]) for name in SHAPES)


def test_masks_are_bits_from_the_lowest(tmp_path: Path) -> None:
    d = torch.tensor([[1.0, -1, 2, 0, 1, 1, 1, 1, 3], [2.0, 3, -3, 0, -2, 1, 1, 1, -1]])
    write(tmp_path, *({"x": row} for row in d), {"x": torch.zeros(9)})
    nf.merge(emr(tmp_path, 2), tmp_path / "out")
    found = load_file(tmp_path / "out" / FILE)
    # Sums 3, 2, -1, 0, -1, 2, 2, 2, 2; zero elects minus.
    assert found["0/x"].tolist() == [0b11100001, 1]
    assert found["1/x"].tolist() == [0b11110111, 0]
    assert found["means/x"].tolist() == [[11 / 9, 8 / 9, 1.0], [14 / 9, 13 / 9, 1.0]]
    with safe_open(tmp_path / "out" / FILE, "pt") as file:
        assert file.metadata()["format"] == "neulig_fast.emr_masks.1"
    # Of the first 1, 5, 6, 7 and 8 are kept: |tau| is 2, 1, 1, 1 and 3.
    scale = 11 / 8
    wanted = scale * torch.tensor([2.0, 0, 0, 0, 0, 1, 1, 1, 3])
    torch.testing.assert_close(nf.emr_expert(tmp_path / "out", 0)["x"], wanted)


def test_a_merge_in_bf16_keeps_the_experts_values(tmp_path: Path) -> None:
    """One expert alone is itself, to the bit: nothing was rounded that is not in the file."""
    *models, base = states(2)
    write(tmp_path, *models, base, dtype=torch.bfloat16)
    nf.merge(emr(tmp_path, 1) | {"dtype": "bfloat16"}, tmp_path / "out")
    got = nf.emr_expert(tmp_path / "out", "m0")
    for name in SHAPES:
        assert got[name].dtype == torch.bfloat16
        assert torch.equal(got[name], models[0][name].bfloat16())


def test_the_file_is_of_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Journal, resumption and verification know it; loaders of weights do not."""
    *models, base = states(4)
    write(tmp_path, *models, base)
    config = emr(tmp_path, 3)
    whole = nf.merge(config, tmp_path / "whole", shard_size=4000)
    assert whole.tensors == len(base)
    files = [load_file(path) for path in (tmp_path / "whole").glob("*.safetensors")]
    assert whole.bytes_out == sum(t.nbytes for file in files for t in file.values())
    size = (tmp_path / "whole" / FILE).stat().st_size
    assert verify(tmp_path / "whole").files[FILE]["bytes"] == size
    index = (tmp_path / "whole/model.safetensors.index.json").read_text()
    assert "means/" not in index and FILE not in index
    record = Staging.record

    def failing(self: Staging, name: str, checksum: str) -> None:
        if len(self.sums) == 7:
            raise OSError("enough")
        record(self, name, checksum)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="enough"):
        patch.setattr(Staging, "record", failing)
        nf.merge(config, tmp_path / "out", threads=1, shard_size=4000)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="enough"):
        patch.setattr(Staging, "record", failing)
        nf.merge(config, tmp_path / "torn", threads=1, shard_size=4000)
    torn = tmp_path / "torn/.merging" / FILE
    header = 8 + int.from_bytes(torn.read_bytes()[:8], "little")
    torn.write_bytes(torn.read_bytes()[:header].ljust(size, b"\0"))
    assert nf.merge(config, tmp_path / "torn", shard_size=4000).resumed == 1  # the integers
    assert llamas.contents(tmp_path / "torn") == llamas.contents(tmp_path / "whole")
    report = nf.merge(config, tmp_path / "out", shard_size=4000)
    # The integers, and one tensor with its masks and means; of the next a mask alone.
    assert report.resumed == 2 and report.tensors == len(base)
    assert llamas.contents(tmp_path / "out") == llamas.contents(tmp_path / "whole")
    path = tmp_path / "out" / FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert "differs" in refusal(lambda: verify(tmp_path / "out"))
    other = recipe(tmp_path, "task_arithmetic", [{"weight": 1}])
    nf.merge(other, tmp_path / "whole")
    assert not (tmp_path / "whole" / FILE).exists()


def test_tensors_beyond_a_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = normal(3, BLOCK + 13, seed=4)
    write(tmp_path, *({"x": row} for row in rows))
    nf.merge(emr(tmp_path, 2), tmp_path / "out")
    monkeypatch.setattr(tiles, "_STREAMED", BLOCK)
    nf.merge(emr(tmp_path, 2), tmp_path / "tiles")
    assert llamas.contents(tmp_path / "tiles") == llamas.contents(tmp_path / "out")
    d = (rows[:2] - rows[2]).double()
    sign = torch.where(d.sum(0) > 0, 1, -1)
    bits = np.unpackbits(load_file(tmp_path / "out" / FILE)["1/x"].numpy(), bitorder="little")
    assert bits[: BLOCK + 13].tolist() == (d[1] * sign > 0).int().tolist()
    assert not bits[BLOCK + 13 :].any()


def test_hostile_experts(tmp_path: Path) -> None:
    zero = torch.zeros(5)
    write(tmp_path, {"x": zero}, {"x": zero}, {"x": zero})
    nf.merge(emr(tmp_path, 2), tmp_path / "out")
    assert nf.emr_expert(tmp_path / "out", 0)["x"].tolist() == [0] * 5
    write(tmp_path, {"x": torch.tensor([1.0, NAN, 1, 1, 1])}, {"x": zero + 1}, {"x": zero})
    nf.merge(emr(tmp_path, 2), tmp_path / "out")
    assert nf.emr_expert(tmp_path / "out", 0)["x"].isnan()[0]  # its scale is not a number
    assert nf.emr_expert(tmp_path / "out", 1)["x"][0] == 1.25  # the second of its five is not kept


def test_what_cannot_be(tmp_path: Path) -> None:
    *models, base = states(3)
    write(tmp_path, *models, base)
    nf.merge(emr(tmp_path, 2), tmp_path / "out")

    def text(expert: Any = 0, base: str = "base") -> str:
        return refusal(lambda: nf.emr_expert(tmp_path / "out", expert, tmp_path / base))

    assert "there is no expert 'm5' (known: " in text("m5")
    assert "there is no expert 2 (known: " in text(2)
    llamas.write(tmp_path / "other", {"a": torch.zeros(9, 6)}, torch.float32, shards=1)
    found = text(base="other")
    assert "the base has 'a' of shape [9, 6], the merge [6, 9]" in found
    assert "the base has no 'cube'" in found
    with pytest.raises(FileNotFoundError, match="is no merge of EMR's"):
        nf.emr_expert(tmp_path / "base", 0)
    merged(tmp_path, emr(tmp_path, 2, **{"lambda": 0}))
    assert "lambda must have been the same for all tensors and not 0, got 0" in text()
    llamas.write(tmp_path / "out2", {"x": torch.ones(2)}, shards=1)
    save_file({"x": torch.ones(2)}, tmp_path / "out2" / FILE)
    assert "not of the format" in refusal(lambda: nf.emr_expert(tmp_path / "out2", 0))


def test_masks_of_strangers_are_checked_before_they_are_read(tmp_path: Path) -> None:
    *models, base = states(3)
    write(tmp_path, *models, base)
    nf.merge(emr(tmp_path, 2), tmp_path / "out")
    path = tmp_path / "out" / FILE
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    good = load_file(path)
    wrong = {
        "0/a": good["0/a"][:1],
        "1/v": good["1/v"].char(),
        "means/one": torch.zeros(1, 3, dtype=torch.float64),
        "0/other": torch.zeros(1, dtype=torch.uint8),
    }
    save_file(good | wrong, path, metadata)
    found = refusal(lambda: nf.emr_expert(tmp_path / "out", 0))
    assert all(repr(name) in found for name in wrong), found
    for experts in ("", "3", "[3]", "[" * 9999):
        save_file(good, path, {**metadata, "experts": experts})
        assert "does not say which experts" in refusal(lambda: nf.emr_expert(tmp_path / "out", 0))
    del metadata["experts"]
    save_file(good, path, metadata)
    assert "does not say which experts" in refusal(lambda: nf.emr_expert(tmp_path / "out", 0))
