"""Merging of whole checkpoints: results against fp64, layout of the files, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import neulig_fast as nf
from neulig_fast import testing
from neulig_fast.checkpoints import resources, tiles, workspace
from neulig_fast.checkpoints.checkpoint import open_checkpoint
from neulig_fast.checkpoints.manifest import verify
from neulig_fast.checkpoints.prepared import prepare
from neulig_fast.demo import llamas as samples

State = Mapping[str, Tensor]
ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, dict[str, Tensor]]:
    return samples.family(tmp_path)


def recipe(folder: Path, method: str, names: list[str], **more: Any) -> dict[str, Any]:
    """Models by absolute path; what is written ``base`` is so, too."""
    own = more.pop("each", [{} for _ in names])
    listed = [
        {"model": str(folder / name), "parameters": parameters}
        for name, parameters in zip(names, own, strict=True)
    ]
    if "base_model" in more:
        more["base_model"] = str(folder / more["base_model"])
    return {"merge_method": method, "models": listed, **more}


def assert_rounded(got: Tensor, wanted: Tensor, slack: float = 1e-6) -> None:
    """One rounding of an almost exact value."""
    scale = wanted.abs() * ULP[got.dtype] + slack * wanted.abs().mean()
    worst = ((got.double() - wanted).abs() / scale.clamp(min=1e-12)).max()
    assert worst <= 1, f"{worst} roundings away"


def merged(config: Mapping[str, Any], out: Path, **options: Any) -> dict[str, Tensor]:
    nf.merge(config, out, **options)
    verify(out)
    return samples.load(out)


# -- weighted averages ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_linear_is_the_weighted_mean(tmp_path: Path, dtype: torch.dtype) -> None:
    models = samples.family(tmp_path, dtype=dtype)
    weights = [0.3, 0.5, 0.7]
    each = [{"weight": w} for w in weights]
    result = merged(recipe(tmp_path, "linear", ["m0", "m1", "m2"], each=each), tmp_path / "out")
    assert result.keys() == models["base"].keys()
    for name, got in result.items():
        assert got.dtype == dtype
        total = sum(w * models[f"m{i}"][name].double() for i, w in enumerate(weights))
        assert_rounded(got, total / 1.5)


def test_linear_without_normalising(tmp_path: Path, models: State) -> None:
    config = recipe(
        tmp_path,
        "linear",
        ["m0", "m1"],
        each=[{"weight": 2}, {"weight": -1}],
        parameters={"normalize": False},
        dtype="float32",
    )
    for name, got in merged(config, tmp_path / "out").items():
        wanted = 2 * models["m0"][name].double() - models["m1"][name].double()
        assert_rounded(got, wanted)


def test_weights_by_filter_and_depth(tmp_path: Path, models: Any) -> None:
    weight = [{"filter": "self_attn", "value": [1, 3]}, {"filter": "mlp", "value": 5}, {"value": 7}]
    config = recipe(
        tmp_path,
        "linear",
        ["m0", "m1"],
        each=[{"weight": weight}, {"weight": 1}],
        out_dtype="float32",
    )
    wanted = {
        "model.layers.0.self_attn.q_proj.weight": 1,
        "model.layers.1.self_attn.q_proj.weight": 3,
        "model.layers.0.mlp.up_proj.weight": 5,
        "model.norm.weight": 7,
        "model.layers.1.input_layernorm.weight": 7,
    }
    result = merged(config, tmp_path / "out")
    for name, w in wanted.items():
        total = w * models["m0"][name].double() + models["m1"][name].double()
        assert_rounded(result[name], total / (w + 1))


def test_models_of_mixed_types_are_read_exactly(tmp_path: Path) -> None:
    base = samples.tensors(0)
    one = samples.write(tmp_path / "m0", base, torch.float16)
    two = samples.write(tmp_path / "m1", samples.tensors(1), torch.bfloat16)
    config = recipe(tmp_path, "linear", ["m0", "m1"], each=[{"weight": 1}] * 2, dtype="float32")
    for name, got in merged(config, tmp_path / "out").items():
        assert_rounded(got, (one[name].double() + two[name].double()) / 2)


def test_what_is_not_a_float_is_the_donors(tmp_path: Path) -> None:
    state = samples.tensors(0) | {"model.position_ids": torch.arange(50)}
    samples.write(tmp_path / "m0", state)
    samples.write(tmp_path / "m1", state | {"model.position_ids": torch.arange(50) + 1})
    config = recipe(tmp_path, "linear", ["m0", "m1"], each=[{"weight": 1}] * 2)
    got = merged(config, tmp_path / "out")["model.position_ids"]
    assert torch.equal(got, torch.arange(50))


# -- spheres --------------------------------------------------------------------------------------


def arc(x: Tensor, y: Tensor, t: float) -> Tensor:
    """Shoemake's formula."""
    angle = torch.arccos((x * y).sum() / x.norm() / y.norm())
    return (torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle)


def test_slerp_begins_at_the_base(tmp_path: Path, models: Any) -> None:
    for t in (0.0, 0.3, 1.0):
        config = recipe(
            tmp_path, "slerp", ["base", "m0"], base_model="base", parameters={"t": t}
        ) | {"dtype": "float32"}
        result = merged(config, tmp_path / "out")
        for name, got in result.items():
            x, y = models["base"][name].double(), models["m0"][name].double()
            cosine = (x * y).sum() / x.norm() / y.norm()
            wanted = arc(x, y, t) if cosine < 0.9995 else (1 - t) * x + t * y
            assert_rounded(got, wanted, slack=1e-5)


def test_slerp_of_parallel_models_is_linear(tmp_path: Path) -> None:
    base = samples.write(tmp_path / "base", samples.tensors(0), torch.float32)
    samples.write(tmp_path / "m0", {n: 3 * t for n, t in base.items()}, torch.float32)
    config = recipe(tmp_path, "slerp", ["m0"], base_model="base", parameters={"t": 0.25})
    for name, got in merged(config, tmp_path / "out").items():
        assert_rounded(got, 1.5 * base[name].double())


def test_nuslerp_of_task_vectors(tmp_path: Path, models: Any) -> None:
    each = [{"weight": 1}, {"weight": 3}]
    config = recipe(tmp_path, "nuslerp", ["m0", "m1"], each=each, base_model="base")
    for name, got in merged(config | {"dtype": "float32"}, tmp_path / "out").items():
        base = models["base"][name].double()
        deltas = [models[m][name].double() - base for m in ("m0", "m1")]
        assert_rounded(got, base + arc(*deltas, 0.75), slack=1e-5)


def test_the_karcher_mean_has_no_direction_left(tmp_path: Path, models: Any) -> None:
    names = ["m0", "m1", "m2"]
    config = recipe(tmp_path, "karcher", names, dtype="float32")
    for name, got in merged(config, tmp_path / "out").items():
        rows = [models[m][name].double().flatten() for m in names]
        mean = got.double().flatten()
        norm = sum(float(row.norm()) for row in rows) / 3
        assert float(mean.norm()) == pytest.approx(norm, rel=1e-5)
        mean = mean / mean.norm()
        logs = torch.zeros_like(mean)
        for row in rows:
            unit = row / row.norm()
            angle = torch.arccos((unit @ mean).clamp(-1, 1))
            logs += (unit - (unit @ mean) * mean) * angle / torch.sin(angle)
        assert float(logs.norm()) < 1e-4


def test_multislerp_of_two_is_slerp_between_directions(tmp_path: Path, models: Any) -> None:
    each = [{"weight": 1}] * 2
    config = recipe(tmp_path, "multislerp", ["m0", "m1"], each=each, dtype="float32")
    for name, got in merged(config, tmp_path / "out").items():
        x, y = (models[m][name].double() for m in ("m0", "m1"))
        wanted = arc(x / x.norm(), y / y.norm(), 0.5) * (x.norm() + y.norm()) / 2
        assert_rounded(got, wanted, slack=1e-5)


def test_model_stock_against_its_formula(tmp_path: Path, models: Any) -> None:
    config = recipe(tmp_path, "model_stock", ["m0", "m1", "m2"], base_model="base")
    for name, got in merged(config | {"dtype": "float32"}, tmp_path / "out").items():
        base = models["base"][name].double().flatten()
        deltas = [models[f"m{i}"][name].double().flatten() - base for i in range(3)]
        pairs = [(0, 1), (0, 2), (1, 2)]
        cosines = [
            float(deltas[i] @ deltas[j] / deltas[i].norm() / deltas[j].norm()) for i, j in pairs
        ]
        c = float(np.mean(cosines))
        ratio = 3 * c / (1 + 2 * c)
        wanted = base + ratio * (sum(deltas) / 3)
        assert_rounded(got.flatten(), wanted, slack=1e-5)


def test_model_stock_of_what_has_no_ratio_is_the_base(tmp_path: Path) -> None:
    """Task vectors that cancel, as those of a scalar may; and tiny ones, as mergekit has it."""
    x, y = torch.eye(40)[0], torch.eye(40)[1]
    third = [x, -0.5 * x + 0.75**0.5 * y, -0.5 * x - 0.75**0.5 * y]
    cases = [[torch.tensor(1.0), torch.tensor(-0.5)], [x + y, -2 * (x + y)], third]
    for number, rows in enumerate([*cases, [1e-4 * x, 1e-4 * x]]):
        base = torch.zeros_like(rows[0])
        for name, row in [("base", base), *((f"m{i}", row) for i, row in enumerate(rows))]:
            samples.write(tmp_path / name, {"x": row}, torch.float32, shards=1)
        names = [f"m{i}" for i in range(len(rows))]
        got = merged(recipe(tmp_path, "model_stock", names, base_model="base"), tmp_path / "out")
        c = 1e-8 / 1e-6
        wanted = base if number < len(cases) else 2 * c / (1 + c) * rows[0]
        torch.testing.assert_close(got["x"], wanted, rtol=1e-5, atol=1e-9)


def test_wise_ft_lies_between(tmp_path: Path, models: Any) -> None:
    config = recipe(tmp_path, "wise_ft", ["m0"], base_model="base", parameters={"alpha": 0.3})
    for name, got in merged(config, tmp_path / "out").items():
        assert_rounded(got, 0.7 * models["base"][name].double() + 0.3 * models["m0"][name].double())


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_directions_that_cancel_are_averaged(tmp_path: Path, method: str) -> None:
    """Opposite directions have no mean on the sphere; three that cancel have none either."""
    x, y = torch.eye(40)[0], torch.eye(40)[1]
    third = [x, -0.5 * x + 0.75**0.5 * y, -0.5 * x - 0.75**0.5 * y]
    for number, rows in enumerate([[x + y, -2 * (x + y)], third, [x, x, -x]]):
        for i, row in enumerate(rows):
            samples.write(tmp_path / f"m{i}", {"x": row}, torch.float32, shards=1)
        each = [{"weight": 1.0} if method == "multislerp" else {}] * len(rows)
        config = recipe(tmp_path, method, [f"m{i}" for i in range(len(rows))], each=each)
        nf.merge(config, tmp_path / f"out{number}")
        got = samples.load(tmp_path / f"out{number}")["x"]
        wanted = x if len(rows) == 3 and number == 2 else torch.zeros(40)
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp", "karcher", "model_stock"])
def test_zeros_and_equal_models_stay_what_they_are(tmp_path: Path, method: str) -> None:
    base = samples.tensors(0) | {"model.zero": torch.zeros(7), "model.empty": torch.zeros(0, 3)}
    stored = {name: samples.write(tmp_path / name, base) for name in ("base", "m0", "m1")}["m0"]
    names = ["m0"] if method == "slerp" else ["m0", "m1"]
    each = [{"weight": 0.5}] * len(names) if method in ("nuslerp", "multislerp") else None
    config = recipe(tmp_path, method, names, **({"each": each} if each else {}))
    if method in ("slerp", "model_stock"):
        config |= {"base_model": str(tmp_path / "base")}
    if method == "slerp":
        config |= {"parameters": {"t": 0.4}}
    for name, got in merged(config, tmp_path / "out").items():
        torch.testing.assert_close(got, stored[name], rtol=2**-8, atol=0)


# -- slices ---------------------------------------------------------------------------------------


def test_passthrough_stacks_layers(tmp_path: Path, models: Any) -> None:
    config = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(tmp_path / "m0"), "layer_range": [0, 2]}]},
            {"sources": [{"model": str(tmp_path / "m1"), "layer_range": [1, 2]}]},
            {"sources": [{"model": str(tmp_path / "m2"), "layer_range": [0, 1]}]},
        ],
    }
    result = merged(config, tmp_path / "out")
    own = "self_attn.q_proj.weight"
    places = [("m0", 0), ("m0", 1), ("m1", 1), ("m2", 0)]
    for layer, (model, source) in enumerate(places):
        wanted = models[model][f"model.layers.{source}.{own}"]
        assert torch.equal(result[f"model.layers.{layer}.{own}"], wanted)
    assert f"model.layers.4.{own}" not in result
    assert torch.equal(
        result["model.embed_tokens.weight"], models["m0"]["model.embed_tokens.weight"]
    )
    assert torch.equal(result["model.norm.weight"], models["m2"]["model.norm.weight"])
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["num_hidden_layers"] == 4


def test_slices_are_merged_with_depths_of_their_own(tmp_path: Path, models: Any) -> None:
    sources = [
        {"model": str(tmp_path / "m0"), "layer_range": [0, 2], "parameters": {"weight": [1, 0]}},
        {"model": str(tmp_path / "m1"), "layer_range": [0, 2], "parameters": {"weight": [0, 1]}},
    ]
    result = merged({"merge_method": "linear", "slices": [{"sources": sources}]}, tmp_path / "out")
    own = "mlp.up_proj.weight"
    for layer, model in ((0, "m0"), (1, "m1")):
        name = f"model.layers.{layer}.{own}"
        assert torch.equal(result[name], models[model][name])


# -- the same bits --------------------------------------------------------------------------------


EVERY = {
    "linear": {"weight": 0.7},
    "karcher": {},
    "task_arithmetic": {"weight": 0.7},
    "ties": {"weight": 0.7, "density": 0.3},
    "dare_ties": {"weight": 0.7, "density": 0.6},
    "breadcrumbs_ties": {"weight": 0.7, "density": 0.5, "gamma": 0.1},
    "sce": {},
}


@pytest.mark.parametrize("method", EVERY)
def test_bits_depend_on_neither_threads_nor_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    for i in range(4):
        state = samples.tensors(i) | {"big": samples.tensors(i, words=13000)["lm_head.weight"]}
        state["ties"] = state["big"].round()  # some magnitudes, each many times
        samples.write(tmp_path / f"m{i}", state)
    config = recipe(tmp_path, method, ["m0", "m1", "m2"], each=[EVERY[method]] * 3)
    if method not in ("linear", "karcher"):
        config["base_model"] = str(tmp_path / "m3")
    if method == "sce":
        config["parameters"] = {"select_topk": 0.3}
    wanted = merged(config, tmp_path / "whole", threads=1)
    block = 1 << 16
    assert wanted["big"].numel() > 3 * block
    monkeypatch.setattr(tiles, "_STREAMED", block)
    monkeypatch.setattr(
        tiles, "tile_elements", lambda planned, memory: min(block, planned.output.elements)
    )
    got = merged(config, tmp_path / "tiles", threads=3)
    for name, tensor in wanted.items():
        assert torch.equal(tensor, got[name]), name


# -- files ----------------------------------------------------------------------------------------


def test_shards_and_index_are_as_hugging_face_wants_them(tmp_path: Path, models: Any) -> None:
    config = recipe(tmp_path, "linear", ["m0", "m1"], each=[{"weight": 1}] * 2)
    result = merged(config, tmp_path / "out", shard_size=4000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / samples.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in result.values())
    assert index["weight_map"].keys() == result.keys()
    checkpoint = open_checkpoint(tmp_path / "out")
    assert all(e.start % 2 == 0 for e in checkpoint.entries.values())
    config_file = json.loads((tmp_path / "out/config.json").read_text())
    assert config_file["torch_dtype"] == "bfloat16"


_LOADING = """
import os, sys
# Where the project's root is on the path, transformers takes its kernels for a package.
sys.path = [path for path in sys.path if not os.path.exists(path + "/kernels/_launch.py")]
import torch, transformers
load = transformers.LlamaForCausalLM.from_pretrained
one, two, out = (load(f"{sys.argv[1]}/{name}").state_dict() for name in ("m0", "m1", "out"))
for name, got in out.items():
    torch.testing.assert_close(got, (one[name] + two[name]) / 2)
print("all", len(out), "are right")
"""


def test_transformers_loads_the_result(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    samples.family(tmp_path, 2, torch.float32)
    config = recipe(tmp_path, "linear", ["m0", "m1"], each=[{"weight": 1}] * 2)
    nf.merge(config, tmp_path / "out", shard_size=20_000)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", _LOADING, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "are right" in done.stdout, done.stderr


def test_the_recipe_is_kept_byte_for_byte(tmp_path: Path, models: Any) -> None:
    text = (
        "# a comment\nmerge_method:   linear\nmodels:\n"
        "  - {model: m0, parameters: {weight: 1}}\n  - {model: m1, parameters: {weight: 1.0}}\n"
    )
    (tmp_path / "r.yml").write_text(text)
    nf.merge(tmp_path / "r.yml", tmp_path / "out")
    assert (tmp_path / "out/mergekit_config.yml").read_text() == text
    card = (tmp_path / "out/README.md").read_text()
    assert "# a comment" in card and "Made by neulig-fast with **" in card and "](" not in card


def test_the_card_links_what_has_a_page_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A local folder may be called as an id is."""
    samples.write(tmp_path / "models/m0", samples.tensors(0))
    cached = tmp_path / "hub/models--org--code/snapshots/1"
    samples.write(cached, samples.tensors(1))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(cached))
    (tmp_path / "r.yml").write_text(
        "merge_method: linear\nmodels:\n  - {model: models/m0, parameters: {weight: 1}}\n"
        "  - {model: org/code, parameters: {weight: 1}}\n"
    )
    nf.merge(tmp_path / "r.yml", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "* `models/m0`\n* [org/code](https://huggingface.co/org/code)\n" in card
    assert card.startswith("---\nbase_model:\n- org/code\nlibrary_name: transformers\n")
    nf.merge(recipe(tmp_path, "passthrough", ["models/m0"]), tmp_path / "own")
    own = (tmp_path / "own/README.md").read_text()
    assert own.startswith("---\nlibrary_name: transformers\n")
    assert "huggingface.co" not in own


def test_what_is_neither_a_folder_nor_an_id(tmp_path: Path) -> None:
    config = {"merge_method": "passthrough", "models": [{"model": "no folder"}]}
    text = refusal(lambda: nf.merge(config, tmp_path / "out"))
    assert text == "merge: no folder: no folder here, and no id of Hugging Face's"


def test_a_second_merge_leaves_no_stale_shards(tmp_path: Path, models: Any) -> None:
    config = recipe(tmp_path, "linear", ["m0", "m1"], each=[{"weight": 1}] * 2)
    nf.merge(config, tmp_path / "out", shard_size=4000)
    again = merged(config, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in names
    assert not [n for n in names if n.startswith("model-") or n == samples.INDEX]
    fresh = merged(config, tmp_path / "fresh")
    assert samples.contents(tmp_path / "out") == samples.contents(tmp_path / "fresh")
    assert again.keys() == fresh.keys()


# -- what is refused ------------------------------------------------------------------------------


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        act()
    return str(caught.value)


def refused_file(folder: Path, text: str) -> str:
    (folder / "r.yml").write_text(text)
    return refusal(lambda: nf.merge(folder / "r.yml", folder / "out"))


TWO = "models: [{model: m0}, {model: m1}]\n"


def test_a_wrong_recipe_and_missing_folders_come_together(
    tmp_path: Path, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe is the file by its name; ids are not asked for while it is wrong."""
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **_: asked.append(a[0]))
    (tmp_path / "org" / "other").mkdir(parents=True)  # where the owner's models lie
    text = refused_file(
        tmp_path,
        "merge_method: liner\nbase_model: org/code\n"
        "models: [{model: m0}, {model: ./m7+/no/adapter}, {model: m0/m9}]\n",
    )
    assert text.startswith(f"{tmp_path / 'r.yml'}: 4 problems\n  - merge_method: there is no")
    for place in ("./m7", "/no/adapter", "m0/m9"):
        assert f"\n  - {place}: no such folder" in text or f"{place}+" in text
    assert "org/code" not in text and not asked


@pytest.mark.parametrize(
    ("name", "alone", "beside"),
    [
        ("~nobody-of-that-name/m", ["no such folder"], ["no such folder"]),
        (f"./{'a' * 300}", ["File name too long"], ["no such folder"]),
        (f"org/{'a' * 300}", ["no id of Hugging Face's"], []),  # not asked for
    ],
)
def test_folders_that_no_system_could_have(
    tmp_path: Path, models: Any, name: str, alone: list[str], beside: list[str]
) -> None:
    for method, said in (("linear", alone), ("liner", beside)):
        text = refused_file(tmp_path, f"merge_method: {method}\nmodels: [{{model: {name}}}]\n")
        assert (method == "liner") == ("merge_method: there is no" in text)
        assert all(part in text for part in said)


def test_missing_folders_and_wrong_settings_come_together(tmp_path: Path, models: Any) -> None:
    text = refused_file(
        tmp_path,
        "merge_method: ties\nbase_model: ./m8\nmodels:\n"
        "  - {model: m0, parameters: {weight: 1, density: [{filter: x, value: [0, 2]}]}}\n"
        "  - {model: m1, parameters: {weight: {value: a}, density: 1}}\n"
        "parameters: {normalize: 3}\n",
    )
    assert text.splitlines() == [
        "merge: 4 problems",
        "  - ./m8: no such folder",
        "  - normalize must be true or false, got 3",
        "  - density for m0 must be a number from 0 to 1, got 2",
        "  - weight for m1 must be a number, got 'a'",
    ]


@pytest.mark.parametrize(
    ("text", "fault", "hint"),
    [
        ("merge_method: ties\nbase_modle: m0\n" + TWO, "needs a base_model", "'base_model'"),
        ("merge_method: linear\nparmeters: {weight: 1}\n" + TWO, "is missing", "'parameters'"),
        ("merge_method: linaer\nmodel: [m0]\n", "must have exactly one of models", "'models'"),
    ],
)
def test_a_misspelt_key_is_named_beside_what_it_causes(
    tmp_path: Path, models: Any, text: str, fault: str, hint: str
) -> None:
    told = refused_file(tmp_path, text)
    assert fault in told
    assert told.splitlines()[-1].startswith("warning: ")
    assert told.endswith(f"unknown key, not read; did you mean {hint}?")


def test_a_fault_of_many_tensors_is_one_line(tmp_path: Path, models: Any) -> None:
    """The first of them by name and how many more; other shapes are other problems."""
    config = recipe(tmp_path, "linear", ["m0", "m1"], each=[{"weight": 1}, {"weight": -1}])
    floats = [name for name, t in models["m0"].items() if t.is_floating_point()]
    text = refusal(lambda: nf.merge(config, tmp_path / "out"))
    assert text.count("\n") == 0 and f" and {len(floats) - 3} more: " in text
    assert sum(f"{name!r}" in text for name in floats) == 3
    config = recipe(tmp_path, "linear", ["m0", "m1"], each=[{"weight": 1}] * 2)
    halved = {n: t[: len(t) // 2] if t.ndim else t for n, t in models["m1"].items()}
    samples.write(tmp_path / "m1", halved)
    shapes = {tuple(t.shape) for t in models["m0"].values() if t.ndim}
    text = refusal(lambda: nf.merge(config, tmp_path / "out"))
    lines = [line for line in text.splitlines() if "must have one shape" in line]
    assert {str(list(shape)) in text for shape in shapes} == {True} and len(lines) < len(floats)


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    assert refused_file(tmp_path, "").startswith(f"{tmp_path / 'r.yml'}: is empty, expected keys")
    assert "holds a list, expected" in refused_file(tmp_path, "- a\n")


def test_every_mismatch_is_listed_before_a_weight_is_read(tmp_path: Path) -> None:
    one = samples.tensors(0)
    two = dict(one)
    del two["model.norm.weight"]
    two["model.embed_tokens.weight"] = torch.zeros(51, 16)
    two["model.new.weight"] = torch.zeros(3)
    two["lm_head.weight"] = torch.zeros(50, 16, dtype=torch.int32)
    samples.write(tmp_path / "m0", one)
    samples.write(tmp_path / "m1", two)
    config = recipe(tmp_path, "linear", ["m0", "m1"], each=[{"weight": 1}, {}])
    text = refusal(lambda: nf.merge(config, tmp_path / "out"))
    for part in (
        "m1 has no 'model.norm.weight'",
        "has no 'model.new.weight'",
        "'model.embed_tokens.weight' must have one shape, got [50, 16]",
        "another vocabulary?",
        "'lm_head.weight' must be of floats in all models or in none",
        "m1 is missing",
    ):
        assert part in text, part
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"merge_method": "slerp"}, "slerp needs a base_model"),
        ({"merge_method": "karcher", "models": "one"}, "karcher merges at least 2 models"),
        ({"merge_method": "lineer"}, "did you mean 'linear'?"),
        ({"parameters": {"normalize": 3}}, "normalize must be true or false, got 3"),
        ({"neulig_fast": {"parity": "peft"}}, "parity: linear has mergekit, got 'peft'"),
        ({"neulig_fast": {"pairty": "peft"}}, "did you mean 'parity'?"),
    ],
)
def test_recipes_that_cannot_be_merged(
    tmp_path: Path, models: Any, change: dict[str, Any], part: str
) -> None:
    config = recipe(tmp_path, "linear", ["m0", "m1"], each=[{"weight": 1}] * 2) | change
    if config["models"] == "one":
        config["models"] = [{"model": str(tmp_path / "m0")}]
    assert part in refusal(lambda: nf.merge(config, tmp_path / "out"))


def test_weights_that_sum_to_zero_are_not_normalised(tmp_path: Path, models: Any) -> None:
    config = recipe(tmp_path, "linear", ["m0", "m1"], each=[{"weight": 1}, {"weight": -1}])
    assert "sum to zero" in refusal(lambda: nf.merge(config, tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"max_ram": "lots"}, "max_ram must be bytes, or such as 512M or 5G, got 'lots'"),
        ({"max_ram": "10M"}, "max_ram must be at least 128 MiB"),
        ({"shard_size": 0}, "shard_size must be bytes"),
        ({"threads": 0}, "threads must be 1 or more, got 0"),
        ({"device": "gpu"}, "must be auto, cpu, cuda"),
    ],
)
def test_options_that_cannot_be(
    tmp_path: Path, models: Any, options: dict[str, Any], part: str
) -> None:
    config = recipe(tmp_path, "linear", ["m0"], each=[{"weight": 1}])
    assert part in refusal(lambda: nf.merge(config, tmp_path / "out", **options))


def test_models_that_are_not_there_are_all_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = recipe(tmp_path, "linear", ["a", "b"], each=[{"weight": 1}] * 2)
    text = refusal(lambda: nf.merge(config, tmp_path / "out"))
    assert "/a: no such folder" in text
    assert "/b: no such folder" in text


def test_slices_beyond_a_models_layers(tmp_path: Path, models: Any) -> None:
    sources = [{"model": str(tmp_path / "m0"), "layer_range": [1, 3]}]
    config = {"merge_method": "passthrough", "slices": [{"sources": sources}]}
    assert "which has 2 layers" in refusal(lambda: nf.merge(config, tmp_path / "out"))
    base = str(tmp_path / "base")
    sources = [{"model": base, "layer_range": [1, 3]}, {**sources[0], "layer_range": [0, 2]}]
    config = {"merge_method": "slerp", "base_model": base, "slices": [{"sources": sources}]}
    config["parameters"] = {"t": 0.5}
    fault = f"layer_range [1, 3] of {base}, which has 2 layers"
    assert refusal(lambda: nf.merge(config, tmp_path / "out")).count(fault) == 1


def test_a_merge_takes_the_memory_it_was_given(tmp_path: Path) -> None:
    """Of buffers: a tensor larger than memory is merged in tiles."""
    width = 1 << 20
    for i in range(2):
        g = torch.Generator().manual_seed(i)
        samples.write(tmp_path / f"m{i}", {"a": torch.randn(12 * width, generator=g)}, shards=1)
    config = recipe(tmp_path, "karcher", ["m0", "m1"])
    planned = workspace.tile_elements
    seen = []

    def spy(tensor: Any, memory: int) -> int:
        seen.append((planned(tensor, memory), memory))
        return seen[-1][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "tile_elements", spy)
        got = merged(config, tmp_path / "out", max_ram="128M", threads=1)["a"]
    (one,) = prepare(config)[0].plan.tensors
    formulas = workspace.beside_bytes(one, resources.in_pytorch(torch.device("cpu")))
    share = (64 << 20) - resources.THREAD - formulas
    assert seen == [(min(seen[0][0], 12 * width), share)]
    assert seen[0][0] * 6 <= 64 << 20
    assert seen[0][0] < 12 * width
    whole = merged(config, tmp_path / "again", max_ram="1G")["a"]
    assert torch.equal(got, whole)


def test_the_tolerance_rule_holds_against_separate_tensors(tmp_path: Path) -> None:
    """fp32 models: as close to fp64 as a blend in plain PyTorch."""
    models = samples.family(tmp_path, dtype=torch.float32)
    config = recipe(tmp_path, "linear", ["m0", "m1"], each=[{"weight": 0.3}, {"weight": 0.7}])
    for name, got in merged(config, tmp_path / "out").items():
        rows = [models[m][name] for m in ("m0", "m1")]
        working = 0.3 * rows[0] + 0.7 * rows[1]
        oracle = 0.3 * rows[0].double() + 0.7 * rows[1].double()
        testing.assert_within_rule(got, working, oracle, 2)


def test_modules_are_refused_with_what_to_do(tmp_path: Path, models: Any) -> None:
    listed = recipe(tmp_path, "linear", ["m0", "m1"], each=[{"weight": 1}] * 2)["models"]
    config = {"merge_method": "linear", "modules": {"text": {"models": listed}}}
    text = refusal(lambda: nf.merge(config, tmp_path / "out"))
    assert f"modules: {tmp_path / 'm0'} is a LlamaForCausalLM, whose modules are not known" in text
    assert "models, without modules, merges all tensors at once, and filters" in text
