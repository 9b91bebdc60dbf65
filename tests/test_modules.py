"""Recipes with modules: mergekit's results (tools/mergekit_golden.py), its table, and refusals."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import neulig_fast as nf
from neulig_fast.checkpoints import names
from neulig_fast.checkpoints.modules import ARCHITECTURES, placed
from neulig_fast.demo import llamas, towers

DATA = Path(__file__).parent / "data/mergekit_modules"
RECIPES = sorted(path.stem for path in DATA.glob("*.yml"))
COUNTS = {
    "mistral3_ties": {"text_config.num_hidden_layers": 2, "vision_config.num_hidden_layers": 4},
    "qwen_slerp": {"text_config.num_hidden_layers": 3, "vision_config.depth": 2},
    "t5_encoder_alone": {"num_layers": 3, "num_decoder_layers": 2},
    "t5_linear": {"num_layers": 3, "num_decoder_layers": 4},
}


@pytest.fixture
def models(tmp_path: Path, once: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    made = once("modules", lambda root: towers.mergekit_family(root) and None)
    shutil.copytree(made, tmp_path / "models")
    monkeypatch.chdir(tmp_path / "models")
    return tmp_path / "models"


def at(content: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        content = content[part]
    return content


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_recipe_gives_the_same_model(models: Path, name: str) -> None:
    report = nf.merge(DATA / f"{name}.yml", models / "out")
    got, wanted = llamas.load(models / "out"), load_file(DATA / f"{name}.safetensors")
    assert got.keys() == wanted.keys()
    for tensor, value in wanted.items():
        assert (got[tensor].dtype, got[tensor].shape) == (value.dtype, value.shape)
        close = torch.allclose(got[tensor], value, rtol=2e-5, atol=2e-6)
        assert close, f"{tensor}: {(got[tensor] - value).abs().max()}"
    config = json.loads((models / "out/config.json").read_text())
    assert {key: at(config, key) for key in COUNTS[name]} == COUNTS[name]
    left = "modules: decoder, shared of T5ForConditionalGeneration not named, and not in the result"
    assert report.warnings == ((left,) if name == "t5_encoder_alone" else ())


# -- the table ------------------------------------------------------------------------------------


def mergekits() -> dict[str, dict[str, Any]]:
    """Its architectures of several modules, by name; none where it is not installed."""
    found = importlib.util.find_spec("mergekit")
    places = found.submodule_search_locations if found else None
    files = (Path(places[0]) / "_data/architectures").glob("*.json") if places else ()
    contents = [json.loads(file.read_text()) for file in files]
    return {c["architectures"][0]: c for c in contents if "modules" in c}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_of_mergekits_table_is_of_the_same_module(architecture: str) -> None:
    if not (known := mergekits()):
        pytest.skip("the table of mergekit 0.1.5 is compared where that is installed")
    assert known.keys() == ARCHITECTURES.keys()
    modules = ARCHITECTURES[architecture]
    assert known[architecture]["modules"].keys() == modules.keys()
    for name, wanted in known[architecture]["modules"].items():
        own, made = modules[name], wanted["architecture"]
        prefix = wanted.get("weight_prefix") or ""
        if prefix == "model.decoder":  # Whisper's, whose names mergekit makes without a dot
            prefix = "model.decoder."
        kinds = {kind: made[kind] for kind in ("pre_weights", "post_weights")}
        kinds["layers"] = made["layer_templates"]["weights"]
        for kind, weights in kinds.items():
            for weight in weights:
                tensor = prefix + weight["name"].replace("${layer_index}", "11")
                assert placed([tensor], modules) == {tensor: name}
                if own.layers:
                    assert (names.split(tensor) is not None) == (kind == "layers")
                    first = names.is_before_layers(tensor, own.first)
                    assert kind == "layers" or first == (kind == "pre_weights"), tensor
        key = made.get("num_layers_config_key")
        assert (key in own.layers) if key else own.whole == made["override_num_layers"]


def test_names_as_later_releases_of_transformers_have_them(models: Path) -> None:
    """``model.`` comes before all but the head, and the tower is in it."""
    renamed = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }

    def new(name: str) -> str:
        old = next(prefix for prefix in renamed if name.startswith(prefix))
        return renamed[old] + name.removeprefix(old)

    nf.merge(DATA / "mistral3_ties.yml", models / "old")
    for name in towers.NAMES:
        folder = models / f"mistral3_{name}"
        state = {new(n): t for n, t in llamas.load(folder).items()}
        config = json.loads((folder / "config.json").read_text())
        shutil.rmtree(folder)
        llamas.write(folder, state, torch.float32)
        (folder / "config.json").write_text(json.dumps(config))
    nf.merge(DATA / "mistral3_ties.yml", models / "new")
    wanted = {new(name): tensor for name, tensor in llamas.load(models / "old").items()}
    got = llamas.load(models / "new")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_a_whisper_of_which_the_decoder_is_cut(tmp_path: Path) -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        g = torch.Generator().manual_seed(seed)
        towers = ("encoder.conv1", "encoder.layer_norm", "decoder.embed_tokens")
        layers = (f"{n}.layers.{i}.fc1" for n in ("encoder", "decoder") for i in range(2))
        return {f"model.{n}.weight": torch.randn(3, generator=g) for n in (*towers, *layers)}

    config = {"architectures": ["WhisperForConditionalGeneration"], "decoder_layers": 2}
    states = [llamas.write(tmp_path / f"m{i}", state(i), torch.float32, 1) for i in range(2)]
    for i in range(2):
        (tmp_path / f"m{i}/config.json").write_text(json.dumps(config))
    cut = [[("m0", 0, 2)], [("m1", 1, 2)]]
    conv = [[("m1", 1, 2)], [("m0", 0, 1)]]
    modules = {
        name: {
            "slices": [
                {
                    "sources": [
                        {"model": str(tmp_path / m), "layer_range": [a, b]} for m, a, b in piece
                    ]
                }
                for piece in pieces
            ]
        }
        for name, pieces in {"encoder": conv, "decoder": cut}.items()
    }
    nf.merge({"merge_method": "passthrough", "modules": modules}, tmp_path / "out")
    got = llamas.load(tmp_path / "out")
    m0, m1 = states
    wanted = {
        "model.encoder.conv1.weight": m1["model.encoder.conv1.weight"],
        "model.encoder.layers.0.fc1.weight": m1["model.encoder.layers.1.fc1.weight"],
        "model.encoder.layers.1.fc1.weight": m0["model.encoder.layers.0.fc1.weight"],
        "model.encoder.layer_norm.weight": m0["model.encoder.layer_norm.weight"],
        "model.decoder.embed_tokens.weight": m0["model.decoder.embed_tokens.weight"],
        "model.decoder.layers.0.fc1.weight": m0["model.decoder.layers.0.fc1.weight"],
        "model.decoder.layers.1.fc1.weight": m0["model.decoder.layers.1.fc1.weight"],
        "model.decoder.layers.2.fc1.weight": m1["model.decoder.layers.1.fc1.weight"],
    }
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["decoder_layers"], written["encoder_layers"]) == (3, 2)  # the latter is new


# -- with what else a recipe may say --------------------------------------------------------------


def modules(prefix: str, **parts: Any) -> dict[str, Any]:
    """A linear merge of two models; ``parts`` take the place of modules that have both."""
    every = {"t5_": ("encoder", "decoder", "shared")}
    two = [{"model": f"{prefix}base"}, {"model": f"{prefix}m0"}]
    found = {name: {"models": two} for name in every.get(prefix, ())} | parts
    return {"merge_method": "linear", "modules": found, "parameters": {"weight": 1}}


def test_a_sweep_reaches_what_modules_say_of_their_own(models: Path) -> None:
    sources = [{"model": f"t5_{m}", "parameters": {"weight": 9}} for m in ("base", "m0")]
    config = modules("t5_", shared={"models": sources, "parameters": {"normalize": True}})
    config["neulig_fast"] = {"sweep": {"weight": [0.25, 0.5], "normalize": [False]}}
    nf.merge(config, models / "out")
    base, m0 = (llamas.load(models / f"t5_{m}") for m in ("base", "m0"))
    for weight in (0.25, 0.5):
        got = llamas.load(models / f"out/weight={weight},normalize=false")
        assert got.keys() == base.keys()
        for name, tensor in got.items():
            torch.testing.assert_close(tensor, weight * (base[name] + m0[name]))


def test_fisher_matrices_beside_models_are_cut_too(models: Path) -> None:
    """One module has others."""
    base, m0 = (llamas.load(models / f"t5_{name}") for name in ("base", "m0"))
    for value in (1.0, 3.0, 4.0):
        state = {tensor: torch.full_like(values, value) for tensor, values in base.items()}
        save_file(state, models / f"fisher_{value:.0f}.safetensors")

    def part(*values: int) -> dict[str, Any]:
        pairs = zip(("base", "m0"), values, strict=True)
        files = {f"t5_{name}": f"fisher_{value}.safetensors" for name, value in pairs}
        own = [{"model": m, "parameters": {"fisher": file}} for m, file in files.items()]
        return {"models": own}

    parts = {"encoder": part(1, 3), "shared": part(1, 3), "decoder": part(1, 4)}
    nf.merge({"merge_method": "fisher", "modules": parts}, models / "out")
    for name, tensor in llamas.load(models / "out").items():
        share = 0.8 if name.startswith("decoder") else 0.75
        torch.testing.assert_close(tensor, (1 - share) * base[name] + share * m0[name])


def test_scope_is_the_model_of_all_modules(models: Path) -> None:
    two = [{"model": "t5_base"}, {"model": "t5_m0"}]
    every = {"merge_method": "ties", "base_model": "t5_base", "parameters": {"density": 0.4}}
    every |= {"neulig_fast": {"scope": "model"}}
    every["parameters"]["weight"] = 1.0
    nf.merge({**every, "models": two}, models / "whole")
    named = {name: {"models": two} for name in ("shared", "encoder", "decoder")}
    nf.merge({**every, "modules": named}, models / "out")
    got, wanted = llamas.load(models / "out"), llamas.load(models / "whole")
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_a_vocabulary_is_told_to_the_section_for_text(models: Path) -> None:
    for name in towers.NAMES[:2]:
        words = {f"{name if i > 9 else ''}{i}": i for i in range(20)}
        content = {"model": {"type": "WordLevel", "vocab": words, "unk_token": "0"}}
        (models / f"qwen_{name}/tokenizer.json").write_text(json.dumps(content))
    two = [{"model": f"qwen_{name}"} for name in towers.NAMES[:2]]
    config = {"merge_method": "linear", "parameters": {"weight": 1}, "tokenizer_source": "union"}
    config["modules"] = {
        name: {"models": two} for name in ARCHITECTURES["Qwen2_5_VLForConditionalGeneration"]
    }
    nf.merge(config, models / "out")
    assert llamas.load(models / "out")["model.embed_tokens.weight"].shape == (30, 8)
    written = json.loads((models / "out/config.json").read_text())
    assert written["text_config"]["vocab_size"] == 30 and "vocab_size" not in written


def test_masks_beside_the_weights_are_of_the_same_models_in_all_modules(models: Path) -> None:
    parts = {"encoder": ("m0", "m1"), "shared": ("m1", "m0"), "decoder": ("m0", "m1")}
    shutil.rmtree(models / "t5_m1")
    shutil.copytree(models / "t5_m0", models / "t5_m1")
    every = {n: {"models": [{"model": f"t5_{m}"} for m in part]} for n, part in parts.items()}
    config = {"merge_method": "emr", "base_model": "t5_base", "modules": every}
    said = "needs the same models in all slices, got (t5_m0, t5_m1) and (t5_m1, t5_m0)"
    assert said in refusal(config)
    every["shared"] = every["encoder"]
    nf.merge(config, models / "out")


def test_the_number_of_layers_where_gpt2_has_it(tmp_path: Path) -> None:
    state = {f"h.{i}.w": torch.full((2,), float(i)) for i in range(3)}
    llamas.write(tmp_path / "gpt", state, torch.float32, 1)
    (tmp_path / "gpt/config.json").write_text('{"n_layer": 3}')
    source = {"model": str(tmp_path / "gpt"), "layer_range": [1, 3]}
    config = {"merge_method": "passthrough", "slices": [{"sources": [source]}] * 2}
    nf.merge(config, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["n_layer"] == 4


def test_a_base_of_a_module_is_read_and_said_to_be(models: Path) -> None:
    config = {
        "merge_method": "task_arithmetic",
        "base_model": "t5_base",
        "parameters": {"weight": 1},
        "modules": {"shared": {"models": [{"model": "t5_base"}], "base_model": "t5_m0"}},
    }
    report = nf.merge(config, models / "out")
    assert "modules.shared.base_model: is read, which mergekit does not do here" in report.warnings
    base = llamas.load(models / "t5_base")
    for name, tensor in llamas.load(models / "out").items():
        torch.testing.assert_close(tensor, base[name])  # m0 and all of the difference to it


def test_keys_of_a_module_that_say_nothing(models: Path) -> None:
    config = modules("t5_")
    nf.merge(config, models / "wanted")
    for part in config["modules"].values():
        part |= {"merge_method": None, "base_model": None}
    assert nf.merge({**config, "base_model": "t5_base"}, models / "out").warnings == ()
    got, wanted = llamas.load(models / "out"), llamas.load(models / "wanted")
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


# -- what is refused ------------------------------------------------------------------------------


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        nf.merge(config, Path("out"))
    assert not Path("out").exists()
    return str(caught.value)


def cut(prefix: str, *ranges: tuple[str, int, int]) -> dict[str, Any]:
    """A slice of layers of models."""
    return {"sources": [{"model": prefix + m, "layer_range": [a, b]} for m, a, b in ranges]}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            modules("t5_", encodr={"models": [{"model": "t5_m0"}]}),
            "modules.encodr: T5ForConditionalGeneration has no such module (known: decoder, "
            "encoder, shared); did you mean 'encoder'?",
        ),
        (
            modules("t5_", default={"models": [{"model": "t5_m0"}]}),
            "modules.default: T5ForConditionalGeneration has no such module",
        ),
        (
            modules("t5_", encoder={"models": [{"model": "qwen_m0"}]}),
            "models must be of one architecture, got Qwen2_5_VLForConditionalGeneration (qwen_m0), "
            "T5ForConditionalGeneration (t5_base)",
        ),
        (
            modules("t5_", encoder={"slices": [cut("t5_", ("base", 0, 4), ("m1", 0, 4))]}),
            "layer_range [0, 4] of t5_base, which has 3 layers",
        ),
        (
            modules("t5_", encoder={"slices": [cut("t5_", ("base", 0, 0), ("m0", 0, 0))]}),
            "layer_range [0, 0] of t5_base, which has 3 layers",
        ),
        (
            modules("t5_", shared={"slices": [cut("t5_", ("base", 0, 1), ("m0", 0, 1))]}),
            "modules.shared: layer_range must be [0, 0], all of the module, got [0, 1]",
        ),
        (
            modules("t5_", shared={"slices": [cut("t5_", ("base", 0, 0))] * 2}),
            "modules.shared: has no layers to stack, got 2 slices",
        ),
        (
            modules("t5_", encoder={"slices": [cut("t5_", ("base", 1, 3), ("m0", 0, 2))]}),
            "t5_base has no 'layer.0.SelfAttention.relative_attention_bias.weight' of layer 1, "
            "t5_m0 has 'encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight'",
        ),
        (
            modules("t5_", shared={"merge_method": "ties", "models": [{"model": "t5_m0"}]}),
            "modules.shared.merge_method: all modules have one method, 'linear' (in mergekit too, "
            "which does not read it here), got 'ties'",
        ),
    ],
)
@pytest.mark.usefixtures("models")
def test_what_cannot_be_merged(config: dict[str, Any], said: str) -> None:
    assert said in refusal(config)


def test_slices_of_a_model_with_several_stacks_point_to_modules(models: Path) -> None:
    config = {"merge_method": "passthrough", "slices": [cut("t5_", ("base", 0, 1))]}
    assert "t5_base has decoder.block.0..1, encoder.block.0..2 (modules cuts" in refusal(config)


def test_faults_of_all_modules_come_at_once(models: Path) -> None:
    config = modules(
        "t5_",
        encoder={"slices": [cut("t5_", ("base", 0, 9))]},
        decoder={"slices": [cut("t5_", ("m0", 0, 7))]},
    )
    text = refusal(config)
    assert "[0, 9] of t5_base" in text and "[0, 7] of t5_m0" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "modules need the architecture's name; there is no t5_m0/config.json"),
        ("{", "t5_m0/config.json: is no JSON"),
        ("{}", "architectures must be a list of one name, got None"),
        ('{"architectures": ["A", "B"]}', "a list of one name, got ['A', 'B']"),
        (
            '{"architectures": ["LlamaForCausalLM"]}',
            "modules: t5_m0 is a LlamaForCausalLM, whose modules are not known (known: Gemma3For",
        ),
    ],
)
def test_models_whose_architecture_is_not_known(
    models: Path, content: str | None, said: str
) -> None:
    path = models / "t5_m0/config.json"
    path.unlink() if content is None else path.write_text(content)
    assert said in refusal(modules("t5_"))


def test_tensors_of_no_module_are_not_lost_in_silence(models: Path) -> None:
    state = load_file(models / "t5_m0/model-00001-of-00002.safetensors")
    save_file(state | {"extra.weight": torch.ones(1)}, models / "one.safetensors")
    shutil.rmtree(models / "t5_m0")
    (models / "t5_m0").mkdir()
    (models / "one.safetensors").rename(models / "t5_m0/model.safetensors")
    shutil.copy(models / "t5_base/config.json", models / "t5_m0")
    said = "t5_m0 has 'extra.weight', of no module of T5ForConditionalGeneration"
    assert said in refusal(modules("t5_"))
