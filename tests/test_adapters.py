"""LoRA adapters put on models while they are read; as peft merges them: test_peft.py."""

from __future__ import annotations

import json
import os
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import neulig_fast as nf
from neulig_fast.checkpoints import tiles, workspace
from neulig_fast.checkpoints.hub import find_models
from neulig_fast.checkpoints.plan import make_plan
from neulig_fast.checkpoints.read import Reader
from neulig_fast.checkpoints.recipe import ModelRef
from neulig_fast.checkpoints.recipe_file import parse
from neulig_fast.demo import llamas
from neulig_fast.methods import METHODS

BLOCK = 1 << 16
PREFIX = "base_model.model."
Q = "model.layers.1.self_attn.q_proj"


def adapter(folder: Path, state: dict[str, Tensor], **settings: Any) -> None:
    """An adapter as peft writes it, of modules of a model."""
    folder.mkdir()
    save_file({PREFIX + name: t for name, t in state.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))


def factors(
    seed: int,
    module: str,
    shape: tuple[int, int],
    rank: int = 4,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, shape[1], generator=g), torch.randn(shape[0], rank, generator=g)
    return {f"{module}.lora_A.weight": a.to(dtype), f"{module}.lora_B.weight": b.to(dtype)}


def product(state: dict[str, Tensor], module: str) -> Tensor:
    a, b = (state[f"{module}.lora_{which}.weight"].double() for which in "AB")
    return b @ a


def on(root: Path, base: str, *loras: str) -> list[str]:
    return [f"{root}/{base}+{root}/{lora}" for lora in loras]


def taken(root: Path, lora: str = "lora", **options: Any) -> dict[str, Tensor]:
    """The base with an adapter."""
    config = {"merge_method": "passthrough", "models": [{"model": on(root, "base", lora)[0]}]}
    nf.merge(config | options, root / f"out_{lora}")
    return llamas.load(root / f"out_{lora}")


def refusal(root: Path, lora: str = "lora") -> str:
    with pytest.raises(ValueError) as caught:
        taken(root, lora)
    assert not (root / f"out_{lora}").exists()
    return str(caught.value)


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Tensor]:
    return llamas.write(tmp_path / "base", llamas.tensors(0))


# -- the formula ----------------------------------------------------------------------------------


def test_adapters_are_experts(tmp_path: Path, base: dict[str, Tensor]) -> None:
    """bf16 factors on a bf16 model: nothing is rounded before the result is."""
    states = [factors(seed, Q, (16, 16), dtype=torch.bfloat16) for seed in (1, 2)]
    adapter(tmp_path / "one", states[0])
    adapter(tmp_path / "two", states[1], use_rslora=True)
    models = [
        {"model": name, "parameters": {"weight": w}}
        for name, w in zip(on(tmp_path, "base", "one", "two"), (0.3, -0.7), strict=True)
    ]
    config = {"merge_method": "task_arithmetic", "models": models, "dtype": "float32"}
    nf.merge(config | {"base_model": str(tmp_path / "base")}, tmp_path / "out")
    got = llamas.load(tmp_path / "out")
    scales = (8 / 4, 8 / sqrt(4))
    wanted = base[f"{Q}.weight"].double() + sum(
        w * s * product(state, Q) for w, s, state in zip((0.3, -0.7), scales, states, strict=True)
    )
    assert (got[f"{Q}.weight"] - wanted).abs().max() < 1e-5
    for name, own in base.items():
        if name != f"{Q}.weight":
            assert torch.equal(got[name], own.float())


def test_fp64_is_merged_in_fp64(tmp_path: Path) -> None:
    llamas.write(tmp_path / "base", {"q.weight": torch.zeros(5, 7)}, torch.float32, shards=1)
    state = factors(0, "q", (5, 7), dtype=torch.float64)
    adapter(tmp_path / "lora", state, lora_alpha=3)
    got = taken(tmp_path, dtype="float64")["q.weight"]
    torch.testing.assert_close(got, 0.75 * product(state, "q"), rtol=1e-14, atol=1e-14)


def test_the_result_has_the_bases_type_and_is_rounded_once(
    tmp_path: Path, base: dict[str, Tensor]
) -> None:
    state = factors(0, Q, (16, 16))
    adapter(tmp_path / "lora", state)
    got = taken(tmp_path)[f"{Q}.weight"]
    exact = base[f"{Q}.weight"].double() + 2 * product(state, Q)
    assert got.dtype == torch.bfloat16
    assert ((got.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-5).all()


def test_zeros_change_nothing_and_nan_stays_in_its_row(
    tmp_path: Path, base: dict[str, Tensor]
) -> None:
    state = factors(0, Q, (16, 16))
    state[f"{Q}.lora_B.weight"] = torch.zeros(16, 4)
    adapter(tmp_path / "zero", state)
    assert torch.equal(taken(tmp_path, "zero")[f"{Q}.weight"], base[f"{Q}.weight"])
    state[f"{Q}.lora_B.weight"][3, 1] = float("nan")
    adapter(tmp_path / "nan", state)
    lost = taken(tmp_path, "nan")[f"{Q}.weight"].isnan()
    assert lost[3].all() and lost.sum() == 16


@pytest.mark.parametrize("shape", [(1, 1), (0, 3), (3, 0), (1, 5)])
def test_matrices_of_any_size(tmp_path: Path, shape: tuple[int, int]) -> None:
    llamas.write(tmp_path / "base", {"q.weight": torch.ones(shape)}, torch.float32, shards=1)
    state = factors(0, "q", shape, rank=1)
    adapter(tmp_path / "lora", state, r=1, lora_alpha=1)
    got = taken(tmp_path)["q.weight"]
    torch.testing.assert_close(got.double(), 1 + product(state, "q"), rtol=1e-6, atol=1e-6)


# -- tiles and memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["passthrough", "karcher"])
def test_bits_do_not_depend_on_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Rows that no block ends with, rows wider than a block, and transposed ones."""
    shapes = {"tall": (9001, 24), "wide": (3, 70_001), "words": (5003, 40)}
    state = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    llamas.write(tmp_path / "base", state, shards=1)
    loras = factors(1, "tall", shapes["tall"], 100) | factors(2, "wide", shapes["wide"], 100)
    words = factors(3, "words", shapes["words"][::-1], 100)
    loras["words.lora_embedding_A"] = words["words.lora_A.weight"]
    loras["words.lora_embedding_B"] = words["words.lora_B.weight"]
    adapter(tmp_path / "lora", loras, r=100, lora_alpha=200)
    config = {"merge_method": method, "models": [{"model": on(tmp_path, "base", "lora")[0]}]}
    config["models"] += [{"model": str(tmp_path / "base")}] * (method == "karcher")
    config["dtype"] = "float32"  # no rounding hides what differs
    nf.merge(config, tmp_path / "whole", threads=1)
    wanted = llamas.load(tmp_path / "whole")
    if method == "passthrough":
        exact = state["words.weight"].bfloat16().double() + 2 * product(words, "words").T
        torch.testing.assert_close(wanted["words.weight"].double(), exact, rtol=2**-8, atol=1e-4)
    monkeypatch.setattr(tiles, "_STREAMED", BLOCK)
    monkeypatch.setattr(
        tiles, "tile_elements", lambda planned, memory: min(BLOCK, planned.output.elements)
    )
    nf.merge(config, tmp_path / "tiles", threads=3)
    got = llamas.load(tmp_path / "tiles")
    for name, tensor in wanted.items():
        assert torch.equal(tensor, got[name]), name


def test_products_are_the_same_whatever_the_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library of linear algebra may have other bits for other shapes."""
    llamas.write(tmp_path / "base", {"q.weight": torch.zeros(9001, 24)}, shards=1)
    adapter(tmp_path / "lora", factors(0, "q", (9001, 24)))
    model = ModelRef.parse(on(tmp_path, "base", "lora")[0])
    entry = find_models([model], tmp_path)[0][model].entries["q.weight"]
    seen: set[tuple[torch.Size, bytes]] = set()
    multiply = torch.mm

    def spy(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        seen.add((left.shape, left.numpy().tobytes()))
        return multiply(left, right, out=out)

    monkeypatch.setattr(torch, "mm", spy)
    scratch = torch.empty(1 << 20, dtype=torch.uint8)
    whole = torch.empty(entry.elements)
    with Reader() as reader:
        reader.read(entry, 0, whole, scratch)
        wanted = set(seen)
        assert len(wanted) == 4
        for start, stop in ((0, BLOCK), (BLOCK, 2 * BLOCK), (100_001, 100_002), (70_000, 216_024)):
            part = torch.empty(stop - start)
            reader.read(entry, start, part, scratch)
            assert torch.equal(part, whole[start:stop])
    assert seen == wanted


def test_factors_count_as_memory(tmp_path: Path) -> None:
    llamas.write(tmp_path / "base", {"q.weight": torch.zeros(4096, 512)}, shards=1)
    adapter(tmp_path / "lora", factors(0, "q", (4096, 512)))
    model = ModelRef.parse(on(tmp_path, "base", "lora")[0])
    recipe = parse({"merge_method": "passthrough", "models": [{"model": str(model)}]}, METHODS)
    models, _ = find_models([model], tmp_path)
    (planned,) = make_plan(recipe, METHODS["passthrough"], models, 1 << 30).tensors
    assert planned.bytes == 2 * 4096 * 512 + 4 * 4 * (4096 + 512)
    # fp32 of the right factor, 128 rows of the left one, a block; a row and a result; bf16 beside.
    fixed = 4 * (4 * 512 + 4 * 128 + BLOCK)
    least = fixed + BLOCK * (4 + 2 + 2) + 3 * 128
    assert workspace.tile_elements(planned, least) == BLOCK
    views = workspace.Workspace(least, least).views(planned, BLOCK)
    assert views.scratch.numel() >= fixed
    with pytest.raises(ValueError, match=f"'q.weight' needs {least}"):
        workspace.tile_elements(planned, least - 1)


def test_an_adapter_that_changes_is_another_merge(tmp_path: Path, base: dict[str, Tensor]) -> None:
    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Enough

    adapter(tmp_path / "lora", factors(0, Q, (16, 16)))
    config = {"merge_method": "passthrough", "models": [{"model": on(tmp_path, "base", "lora")[0]}]}
    with pytest.raises(Enough):
        nf.merge(config, tmp_path / "out", threads=1, progress=stop)
    os.utime(tmp_path / "lora/adapter_config.json", ns=(1, 1))
    with pytest.raises(ValueError, match="holds an interrupted merge that differs in"):
        nf.merge(config, tmp_path / "out")


# -- what is refused ------------------------------------------------------------------------------


def test_every_fault_of_an_adapters_tensors_is_listed(
    tmp_path: Path, base: dict[str, Tensor]
) -> None:
    layer = "model.layers.0.self_attn"
    state = factors(0, f"{layer}.q_prok", (16, 16))
    state |= factors(1, f"{layer}.k_proj", (16, 16), rank=3)
    state |= factors(2, f"{layer}.v_proj", (16, 17))
    state |= factors(3, "model.layers.0.mlp.up_proj", (16, 48))
    state |= {f"{layer}.o_proj.lora_A.weight": torch.zeros(4, 16)}
    state |= {f"{layer}.o_proj.lora_magnitude_vector": torch.zeros(16)}
    state |= {"lm_head.weight": torch.zeros(51, 16)}
    state |= {
        "model.norm.lora_A.weight": torch.zeros(4),
        "model.norm.lora_B.weight": torch.zeros(4),
    }
    adapter(tmp_path / "lora", state)
    text = refusal(tmp_path)
    for part in (
        f"the adapter is for '{layer}.q_prok.weight', the model has none; did you mean",
        f"'{layer}.k_proj': must have rank 4, got A [3, 16], B [16, 3] on a weight [16, 16]",
        f"'{layer}.v_proj': the shapes do not fit, got A [4, 17], B [16, 4]",
        "got A [4, 48], B [16, 4] on a weight [48, 16]; fan_in_fan_out is false",
        f"'{layer}.o_proj' needs lora_A and lora_B, got lora_A",
        "the adapter has 'model.layers.0.self_attn.o_proj.lora_magnitude_vector', the model has",
        "'lm_head.weight' must have one shape, got [51, 16] in the adapter, [50, 16] in the model",
        "'model.norm': must have matrices",
    ):
        assert part in text, (part, text)


def test_every_fault_of_a_configuration_is_listed(tmp_path: Path, base: dict[str, Tensor]) -> None:
    adapter(
        tmp_path / "lora",
        factors(0, Q, (16, 16)),
        use_dora=True,
        some_day={"a": 1},
        init_lora_weights="pissa_niter_4",
        r=0,
        lora_alpha="8",
        fan_in_fan_out="no",
        rank_pattern={"q": 1.5, "(": 2},
        alpha_pattern=[],
    )
    text = refusal(tmp_path)
    for part in (
        "use_dora = True is not supported",
        "some_day = {'a': 1} is not supported",
        "init_lora_weights = 'pissa_niter_4' changes the model's own weights",
        "r must be 1 or more, got 0",
        "lora_alpha must be a number, got '8'",
        "fan_in_fan_out must be true or false, got 'no'",
        "rank_pattern.q must be a count, got 1.5",
        "rank_pattern.(: is no regular expression",
        "alpha_pattern must be an object of names, got []",
    ):
        assert part in text, (part, text)


def test_other_adapters_and_none(tmp_path: Path, base: dict[str, Tensor]) -> None:
    adapter(tmp_path / "other", {"a.ia3_l": torch.zeros(3)}, peft_type="IA3")
    assert "peft_type must be LORA, got 'IA3'" in refusal(tmp_path, "other")
    adapter(tmp_path / "whole", {"model.norm.weight": torch.zeros(16)})
    assert "has no LoRA matrices" in refusal(tmp_path, "whole")
    (tmp_path / "empty").mkdir()
    assert "needs adapter_config.json and adapter_model.safetensors" in refusal(tmp_path, "empty")
    adapter(tmp_path / "text", factors(0, Q, (16, 16)))
    (tmp_path / "text/adapter_config.json").write_text("[")
    assert "adapter_config.json: is no JSON" in refusal(tmp_path, "text")
    assert "missing: no such folder" in refusal(tmp_path, "missing")


def test_adapters_of_torch_save(tmp_path: Path, base: dict[str, Tensor]) -> None:
    adapter(tmp_path / "lora", factors(0, Q, (16, 16)))
    wanted = taken(tmp_path)
    os.rename(tmp_path / "lora", tmp_path / "old")
    weights = tmp_path / "old/adapter_model.safetensors"
    torch.save(load_file(weights), tmp_path / "old/adapter_model.bin")
    weights.unlink()
    got = taken(tmp_path, "old")
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
