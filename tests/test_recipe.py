"""mergekit's YAML: every form it has, and everything that can be wrong with one at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from neulig_fast import yaml_files
from neulig_fast.checkpoints.recipe import ModelRef, Recipe
from neulig_fast.checkpoints.recipe_file import parse
from neulig_fast.methods import METHODS

TIES = """
models:
  - model: base
  - model: one@main
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: two+adapter@v2
    parameters:
      density: 0.5
      weight: [{filter: mlp, value: 0.5}, {value: 0}]
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: float16
tokenizer_source: union
"""
SLERP = """
slices:
  - sources:
      - {model: one, layer_range: [0, 16]}
      - {model: two, layer_range: [8, 24]}
  - sources: [{model: one, layer_range: [16, 32]}]
    parameters: {t: 0.5}
merge_method: slerp
base_model: one
parameters: {t: [{filter: self_attn, value: [0, 0.5, 1]}, {value: 0.5}]}
out_dtype: bfloat16
tokenizer: {source: base, pad_to_multiple_of: 8}
chat_template: auto
"""
MODULES = """
modules:
  text_decoder:
    slices: [{sources: [{model: one, layer_range: [0, 4]}]}]
  vision_tower:
    models: [{model: one}, {model: two}]
    parameters: {weight: 0.5}
merge_method: linear
"""


def read(text: str) -> Recipe:
    return parse(yaml.safe_load(text), METHODS)


def test_models() -> None:
    recipe = read(TIES)
    (piece,) = recipe.parts[""].slices
    assert [str(s.model) for s in piece.sources] == ["base", "one@main", "two+adapter@v2"]
    assert piece.sources[1].parameters["density"] == [1, 0.7, 0.1]
    assert (recipe.method, recipe.dtype, recipe.tokenizer) == ("ties", "float16", "union")
    assert recipe.parameters == {"normalize": True, "int8_mask": True}
    assert [str(m) for m in recipe.models()] == ["base", "one@main", "two+adapter@v2"]
    assert recipe.warnings == ()


def test_slices() -> None:
    recipe = read(SLERP)
    first, second = recipe.parts[""].slices
    assert [source.layers for source in first.sources] == [(0, 16), (8, 24)]
    assert (len(second.sources), second.parameters) == (1, {"t": 0.5})
    assert [str(model) for model in recipe.models()] == ["one", "two"]
    assert recipe.tokenizer == {"source": "base", "pad_to_multiple_of": 8}


def test_modules() -> None:
    recipe = read(MODULES)
    assert list(recipe.parts) == ["text_decoder", "vision_tower"]
    assert recipe.parts["vision_tower"].parameters == {"weight": 0.5}
    assert recipe.parts["text_decoder"].slices[0].sources[0].layers == (0, 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", ModelRef("a/b")),
        ("a@1", ModelRef("a", "1")),
        ("a+l", ModelRef("a", None, ModelRef("l"))),
        ("a@1+l@2", ModelRef("a", "1", ModelRef("l", "2"))),
    ],
)
def test_models_by_name(text: str, expected: ModelRef) -> None:
    assert ModelRef.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize("text", ["", "@1", "a@", "a@1@2", "a+", "a+b+c", "a+@2"])
def test_what_names_no_model(text: str) -> None:
    with pytest.raises(ValueError, match=r"must (be path|have one LoRA)"):
        ModelRef.parse(text)


def test_foreign_keys_are_warned_of_and_our_own_are_errors() -> None:
    recipe = read(TIES.replace("dtype", "dtyp") + "colour: red\n")
    assert recipe.dtype is None
    assert recipe.warnings == (
        "dtyp: unknown key, not read; did you mean 'dtype'?",
        "colour: unknown key, not read",
    )
    with pytest.raises(ValueError, match=r"neulig_fast.parit: unknown key; did you mean 'parity'"):
        read(TIES + "neulig_fast: {parit: peft}\n")
    assert read(TIES + "neulig_fast: {parity: peft}\n").ours == {"parity": "peft"}
    read_over = "slices: [{sources: [{model: a}], residual_weight: 0.1}]\nmerge_method: linear"
    assert "slices.0.residual_weight: has no meaning" in read(read_over).warnings[0]
    (warning,) = read(SLERP).warnings
    assert warning == "chat_template: is not read; the result has its tokenizer's own"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "recipe: holds a list, expected keys such as"),
        ("models: [{model: a}]", "merge_method: is missing"),
        ("models: [{model: a}]\nmerge_method: tie", "there is no 'tie'; did you mean 'ties'"),
        ("merge_method: ties", "exactly one of models, slices and modules, got none"),
        ("models: [{model: a}]\nslices: []\nmerge_method: ties", "got models and slices"),
        ("models: []\nmerge_method: ties", r"models: must be a list that is not empty, got \[\]"),
        ("models: [3]\nmerge_method: ties", "models.0: must be a mapping, got 3"),
        ("models: [{parameters: {}}]\nmerge_method: ties", "models.0.model: is missing"),
        ("models: [{model: 7}]\nmerge_method: ties", "models.0.model: must be text, got 7"),
        ("models: [{model: a@}]\nmerge_method: ties", "models.0.model: must be path"),
        (
            "models: [{model: a, parameters: {weight: [1, x]}}]\nmerge_method: ties",
            "models.0.parameters.weight: a list over the depth must be of finite numbers, got 'x'",
        ),
        (
            "slices: [{sources: [{model: a, layer_range: [4, 4]}]}]\nmerge_method: ties",
            r"slices.0.sources.0.layer_range: must be \[first, after the last\], got \[4, 4\]",
        ),
        (
            "slices: [{sources: [{model: a, layer_range: [0, 4]}, "
            "{model: b, layer_range: [0, 5]}]}]\nmerge_method: ties",
            r"slices.0: sources must have as many layers each, got \[4, 5\]",
        ),
        ("modules: {a: {}}\nmerge_method: ties", "modules.a: must have exactly one of models"),
        (
            TIES.replace("float16", "flot16"),
            "dtype: must be one of .*did you mean 'float16'",
        ),
        (TIES + "tokenizer: {source: base}", "one of tokenizer_source and tokenizer at most"),
        (TIES + "neulig_fast: 3", "neulig_fast: must be a mapping, got 3"),
    ],
)
def test_what_is_no_recipe(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 20_000, "recursion"),
        ("a: " + "9" * 5000, "digits"),
        ("a: 2020-13-45", "month must be"),
        ("a: &a [*a]", "more than 1000000 values"),
        (
            "k0: &k0 x\n" + "".join(f"k{i}: &k{i} [*k{i - 1}, *k{i - 1}]\n" for i in range(1, 60)),
            "more than 1000000 values",
        ),
    ],
)
def test_hostile_files_are_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "r.yml").write_text(text)
    with pytest.raises(ValueError, match=rf"r.yml: .*{said}"):
        yaml_files.read(tmp_path / "r.yml")


def test_all_faults_come_at_once() -> None:
    with pytest.raises(ValueError, match="recipe: 4 problems"):
        read("models: [{model: 7}, 3]\ndtype: half\nmerge_method: none")


def test_what_is_no_parameter_at_all_is_warned_of_in_any_file() -> None:
    text = "merge_method: linear\nmodels: [{model: a, parameters: {colour: 1, weight: 1}}]\n"
    for more in ("", "neulig_fast: {parity: mergekit}\n"):
        recipe = read(text + more)
        assert "models.0.parameters.colour: unknown key, not read" in recipe.warnings
    typo = text.replace("colour", "wieght")
    assert "did you mean 'weight'" in read(typo).warnings[0]
    with pytest.raises(ValueError, match=r"wieght: unknown key; did you mean 'weight'"):
        read(typo + "neulig_fast: {parity: mergekit}\n")
