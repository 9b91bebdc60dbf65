"""Models of different vocabularies: rows follow their tokens, whatever their order in a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import neulig_fast as nf
from neulig_fast.checkpoints import merging, tiles
from neulig_fast.demo import llamas

BLOCK = 1 << 16
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# m0 has tokens of its own; m1 has others, in another order; "twice" is in both, not in the base.
TOKENS = {
    "base": ["<unk>", "a", "b", "c"],
    "m0": ["<unk>", "a", "b", "c", "mine", "twice"],
    "m1": ["c", "twice", "<unk>", "yours", "a"],
}


def tokenizer(folder: Path, words: list[str], kind: str = "WordLevel", added: int = 0) -> None:
    """Tokens of a model; the last ``added`` are not in the tokenizer's own vocabulary."""
    own = words[: len(words) - added]
    vocab: Any = {word: number for number, word in enumerate(own)}
    if kind == "Unigram":
        vocab = [[word, -1.0] for word in own]
    model: dict[str, Any] = {"type": kind, "vocab": vocab, "unk_token": "<unk>"}
    flags = {"single_word": False, "lstrip": True, "rstrip": False, "normalized": False}
    records = [
        {"id": number, "content": word, "special": True, **flags}
        for number, word in enumerate(words)
        if number >= len(own)
    ]
    content = {
        "version": "1.0",
        "added_tokens": records,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))


def family(
    root: Path,
    dtype: torch.dtype = torch.float32,
    words: dict[str, list[str]] = TOKENS,
    width: int = 16,
) -> dict[str, dict[str, Tensor]]:
    found = {}
    for seed, (name, own) in enumerate(words.items()):
        state = llamas.tensors(seed, layers=1, width=width, words=len(own) + 2)
        found[name] = llamas.write(root / name, state, dtype)
        tokenizer(root / name, own, added=name == "m0")
    return found


def recipe(root: Path, **more: Any) -> dict[str, Any]:
    models = [
        {"model": str(root / name), "parameters": {"weight": weight}}
        for name, weight in (("m0", 0.3), ("m1", 0.5))
    ]
    config = {"merge_method": "task_arithmetic", "models": models, **more}
    return config | {"base_model": str(root / "base")}


def rows(models: dict[str, dict[str, Tensor]], name: str, token: str) -> dict[str, Tensor]:
    """A token's row in every model, by mergekit's rule where it has none."""
    found = {
        model: models[model][name][words.index(token)].double()
        for model, words in TOKENS.items()
        if token in words
    }
    rest = found.get("base", sum(found.values()) / len(found))
    return {model: found.get(model, rest) for model in TOKENS}


def assert_rows(got: Tensor, models: Any, name: str, words: list[str], tolerance: float) -> None:
    assert len(got) == len(words)
    for row, token in zip(got.double(), words, strict=True):
        each = rows(models, name, token)
        wanted = each["base"] + sum(
            w * (each[m] - each["base"]) for m, w in (("m0", 0.3), ("m1", 0.5))
        )
        torch.testing.assert_close(row, wanted, rtol=tolerance, atol=tolerance)


def refusal(config: dict[str, Any], root: Path) -> str:
    with pytest.raises(ValueError) as caught:
        nf.merge(config, root / "out")
    assert not (root / "out").exists()
    return str(caught.value)


def words_of(folder: Path) -> dict[str, int]:
    content = json.loads((folder / "tokenizer.json").read_text())
    added = {record["content"]: record["id"] for record in content["added_tokens"]}
    return content["model"]["vocab"] | added


# -- rows and tokens ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_union(tmp_path: Path, dtype: torch.dtype) -> None:
    models = family(tmp_path, dtype)
    nf.merge(recipe(tmp_path, tokenizer_source="union", dtype="float32"), tmp_path / "out")
    words = ["<unk>", "a", "b", "c", "mine", "twice", "yours"]
    assert words_of(tmp_path / "out") == {word: number for number, word in enumerate(words)}
    got = llamas.load(tmp_path / "out")
    for name in (EMBEDDING, HEAD):
        assert_rows(got[name], models, name, words, 1e-5)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["vocab_size"] == len(words)


def test_the_union_is_a_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    family(tmp_path)
    (tmp_path / "base/vocab.txt").write_text("of the slow tokenizer")
    nf.merge(recipe(tmp_path, tokenizer_source="union"), tmp_path / "out")
    found = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert found.encode("c yours a twice mine nothing").ids == [3, 6, 1, 5, 4, 0]
    records = json.loads((tmp_path / "out/tokenizer.json").read_text())["added_tokens"]
    special = {record["content"]: record["special"] for record in records}
    assert special == {"mine": False, "twice": True, "yours": False}
    assert not (tmp_path / "out/vocab.txt").exists()


@pytest.mark.parametrize("source", ["base", "m1"])
def test_the_tokens_of_one_model(tmp_path: Path, source: str) -> None:
    models = family(tmp_path)
    named = "base" if source == "base" else str(tmp_path / source)
    nf.merge(recipe(tmp_path, tokenizer={"source": named}), tmp_path / "out")
    assert words_of(tmp_path / "out") == words_of(tmp_path / source)
    assert_rows(llamas.load(tmp_path / "out")[HEAD], models, HEAD, TOKENS[source], 1e-5)


def test_equal_tokens_leave_embeddings_as_they_are(tmp_path: Path) -> None:
    """With the rows that no token has."""
    models = family(tmp_path, words=dict.fromkeys(TOKENS, TOKENS["base"]))
    nf.merge(recipe(tmp_path, tokenizer_source="union"), tmp_path / "out")
    nf.merge(recipe(tmp_path), tmp_path / "plain")
    got, wanted = llamas.load(tmp_path / "out"), llamas.load(tmp_path / "plain")
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
    assert got[HEAD].shape == models["base"][HEAD].shape


def test_an_adapter_belongs_to_its_rows(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    models = family(tmp_path)
    a, b = torch.randn(2, 16), torch.randn(len(models["m1"][HEAD]), 2)
    (tmp_path / "lora").mkdir()
    factors = {"lora_A": a, "lora_B": b}
    state = {f"base_model.model.lm_head.{key}.weight": t for key, t in factors.items()}
    save_file(state, tmp_path / "lora/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    asked = recipe(tmp_path, tokenizer_source="union")
    asked["models"][1]["model"] += f"+{tmp_path}/lora"
    assert merging.foresee(asked, tmp_path / "out").bytes_out > 0
    nf.merge(asked, tmp_path / "out")
    models["m1"][HEAD] = models["m1"][HEAD] + b @ a
    words = ["<unk>", "a", "b", "c", "mine", "twice", "yours"]
    assert_rows(llamas.load(tmp_path / "out")[HEAD], models, HEAD, words, 1e-5)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_bits_do_not_depend_on_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    g = torch.Generator().manual_seed(0)
    mixed = torch.randperm(500, generator=g).tolist()
    orders = {
        "base": range(3000),
        "m0": [*range(1000, 4000), *mixed],
        "m1": [*mixed, *range(2500, 5000)],
    }
    words = {name: [f"w{number}" for number in order] for name, order in orders.items()}
    family(tmp_path, torch.bfloat16, words, width=24)  # tiles end within rows
    config = recipe(tmp_path, tokenizer_source="union") | {"merge_method": method}
    nf.merge(config, tmp_path / "whole", threads=1)
    wanted = llamas.load(tmp_path / "whole")
    assert wanted[HEAD].numel() > BLOCK
    monkeypatch.setattr(tiles, "_STREAMED", BLOCK)
    monkeypatch.setattr(
        tiles, "tile_elements", lambda planned, memory: min(BLOCK, planned.output.elements)
    )
    nf.merge(config, tmp_path / "tiles", threads=3)
    got = llamas.load(tmp_path / "tiles")
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def test_kinds_of_tokenizers_mix(tmp_path: Path) -> None:
    models = family(tmp_path)
    tokenizer(tmp_path / "m1", TOKENS["m1"], "Unigram")
    tokenizer(tmp_path / "m0", TOKENS["m0"], "BPE")
    nf.merge(recipe(tmp_path, tokenizer_source="union"), tmp_path / "out")
    words = ["<unk>", "a", "b", "c", "mine", "twice", "yours"]
    assert_rows(llamas.load(tmp_path / "out")[EMBEDDING], models, EMBEDDING, words, 1e-5)


# -- what is refused ------------------------------------------------------------------------------


def test_tokenizers_that_cannot_be_had(tmp_path: Path) -> None:
    family(tmp_path)
    named = recipe(tmp_path, tokenizer_source=f"{tmp_path}/m00")
    wanted = f"m00 is not a model of this recipe; did you mean '{tmp_path}/m0'"
    assert wanted in refusal(named, tmp_path)
    section = {"source": "union", "tokens": {"a": {"source": "b"}}, "pad_to_multiple_of": 8}
    text = refusal(recipe(tmp_path, tokenizer=section), tmp_path)
    assert "tokens is not supported" in text and "pad_to_multiple_of is not supported" in text
    (tmp_path / "m0/tokenizer.json").write_text('{"model": {"vocab": {"a": -1}}}')
    (tmp_path / "m1/tokenizer.json").unlink()
    text = refusal(recipe(tmp_path, tokenizer_source="union"), tmp_path)
    assert "'a' has the id -1" in text
    assert "union needs tokenizer.json of every model" in text and "m1 has none" in text
    for broken in ("[", "[]", '{"model": {"type": "New", "vocab": {}}}', '{"model": {"vocab": 3}}'):
        (tmp_path / "m0/tokenizer.json").write_text(broken)
        text = refusal(recipe(tmp_path, tokenizer_source="base"), tmp_path)
        assert "cannot be read as tokens with ids" in text


def test_tokens_without_rows(tmp_path: Path) -> None:
    family(tmp_path)
    tokenizer(tmp_path / "base", [*TOKENS["base"], "mine", "p", "q"])
    text = refusal(recipe(tmp_path, tokenizer_source="base"), tmp_path)
    assert "1 tokens have no row in any model: 'q'" in text


def test_ids_that_leave_some_out(tmp_path: Path) -> None:
    family(tmp_path)
    path = tmp_path / "base/tokenizer.json"
    path.write_text(path.read_text().replace('"c": 3', '"c": 5'))
    text = refusal(recipe(tmp_path, tokenizer_source="union"), tmp_path)
    assert "its ids leave some out" in text


def test_a_model_without_the_file_is_taken_to_have_the_same_tokens(tmp_path: Path) -> None:
    family(tmp_path, words=TOKENS | {"m0": TOKENS["base"]})
    (tmp_path / "m0/tokenizer.json").unlink()
    text = refusal(recipe(tmp_path, tokenizer_source="base"), tmp_path)
    assert "must have one shape, got [6, 16]" in text


# -- what is by token, under whatever name --------------------------------------------------------


def two(root: Path, **tables: tuple[Any, Any]) -> dict[str, Any]:
    """A base with tokens x, y and one model with y, x, with one tensor for each name."""
    for k, (name, words) in enumerate({"base": ["x", "y"], "m0": ["y", "x"]}.items()):
        state = {key.replace("__", "."): torch.tensor(pair[k]) for key, pair in tables.items()}
        llamas.write(root / name, state, torch.float32, shards=1)
        tokenizer(root / name, words)
    models = [{"model": str(root / name), "parameters": {"weight": 1}} for name in ("base", "m0")]
    own = {"base_model": str(root / "base"), "tokenizer_source": "base"}
    return {"merge_method": "linear", "models": models, **own}


@pytest.mark.parametrize("name", ["shared__weight", "rwkv__emb__weight", "wte__weight"])
def test_embeddings_of_other_names_follow_their_tokens(tmp_path: Path, name: str) -> None:
    config = two(tmp_path, **{name: ([[1.0], [2.0]], [[2.0], [1.0]])})
    nf.merge(config, tmp_path / "out")
    (got,) = llamas.load(tmp_path / "out").values()
    assert got.tolist() == [[1.0], [2.0]]


def test_a_table_of_places_is_left_alone(tmp_path: Path) -> None:
    places = [[1.0], [2.0], [3.0]]
    config = two(tmp_path, wte__weight=([[1.0], [2.0]], [[2.0], [1.0]]), wpe__weight=(places,) * 2)
    nf.merge(config, tmp_path / "out")
    got = llamas.load(tmp_path / "out")
    assert got["wpe.weight"].tolist() == places and got["wte.weight"].tolist() == [[1.0], [2.0]]


def test_a_heads_bias_follows_too_or_is_refused(tmp_path: Path) -> None:
    table, bias = ([[1.0], [2.0]], [[2.0], [1.0]]), ([1.0, 2.0], [2.0, 1.0])
    config = two(tmp_path, wte__weight=table, cls__predictions__bias=bias)
    nf.merge(config, tmp_path / "out")
    assert llamas.load(tmp_path / "out")["cls.predictions.bias"].tolist() == [1.0, 2.0]
    wide = ([bias[0]], [bias[1]])
    config = two(tmp_path / "wide", wte__weight=table, final_logits_bias=wide)
    text = refusal(config, tmp_path / "wide")
    assert "final_logits_bias has values by token that cannot be reordered" in text


def test_an_embedding_that_is_not_known_is_refused(tmp_path: Path) -> None:
    config = two(tmp_path, words__weight=([[1.0], [2.0]], [[2.0], [1.0]]))
    assert "no tensor is known for the embedding" in refusal(config, tmp_path)


def test_a_base_without_the_file_is_warned_of(tmp_path: Path) -> None:
    config = two(tmp_path, wte__weight=([[1.0], [2.0]], [[2.0], [1.0]]))
    (tmp_path / "base/tokenizer.json").unlink()
    report = nf.merge(config, tmp_path / "out")
    assert any("all models' tokens are taken for the same" in text for text in report.warnings)


def test_fisher_models_are_not_reordered(tmp_path: Path) -> None:
    config = two(tmp_path, wte__weight=([[1.0], [2.0]], [[2.0], [1.0]])) | {
        "merge_method": "fisher"
    }
    for model in config["models"]:
        model["parameters"] = {"fisher": str(tmp_path / "m0")}
    assert "merge models of one vocabulary" in refusal(config, tmp_path)
