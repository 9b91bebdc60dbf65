"""Small checkpoints shaped as Llama's: what examples, tests and benchmarks merge."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"


def shapes(layers: int = 2, width: int = 16, words: int = 50) -> dict[str, tuple[int, ...]]:
    """Of all tensors, by name; the width is a multiple of 8."""
    inner = 3 * width
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, width)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
        found |= {f"{prefix}mlp.{n}_proj.weight": (inner, width) for n in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = (width, inner)
        for place in ("input", "post_attention"):
            found[f"{prefix}{place}_layernorm.weight"] = (width,)
    return found | {"model.norm.weight": (width,), "lm_head.weight": (words, width)}


def tensors(seed: int, **sizes: int) -> dict[str, Tensor]:
    """fp32 values by name, standard normal; sizes as of :func:`shapes`."""
    return dict(_drawn(seed, **sizes))


def _drawn(seed: int, **sizes: int) -> Iterator[tuple[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    for name, shape in shapes(**sizes).items():
        yield name, torch.randn(shape, generator=g)


def write(
    folder: Path,
    state: Mapping[str, Tensor],
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 2,
    config: Mapping[str, object] | None = None,
) -> dict[str, Tensor]:
    """A checkpoint as Hugging Face writes it; what it holds."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    names = list(stored)
    count = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    for k in range(shards):
        part = {name: stored[name] for name in names[k * count : (k + 1) * count]}
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(stored) | dict(config or {}), indent=1))
    return stored


def _config(state: Mapping[str, Tensor]) -> dict[str, object]:
    """What transformers needs to load it."""
    embedding = state.get("model.embed_tokens.weight", torch.empty(0, 0))
    up = state.get("model.layers.0.mlp.up_proj.weight", torch.empty(0))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": embedding.shape[1],
        "intermediate_size": len(up),
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": sum(name.endswith("input_layernorm.weight") for name in state),
        "vocab_size": len(embedding),
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }


def family(
    root: Path, count: int = 3, dtype: torch.dtype = torch.bfloat16, **sizes: int
) -> dict[str, dict[str, Tensor]]:
    """``base`` and ``m0`` ...: models near it. What each holds, by its folder's name."""
    return dict(written(root, count, dtype, **sizes))


def written(
    root: Path, count: int = 3, dtype: torch.dtype = torch.bfloat16, **sizes: int
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """:func:`family`, model by model: for large ones, of which memory holds one beside the base."""
    base = tensors(0, **sizes)
    yield "base", write(root / "base", base, dtype)
    for i in range(count):
        near = {n: (base[n] + 0.1 * t).to(dtype) for n, t in _drawn(i + 1, **sizes)}
        yield f"m{i}", write(root / f"m{i}", near, dtype, shards=1 + i % 2)


def mergekit_family(root: Path) -> dict[str, dict[str, Tensor]]:
    """The models in fp32 that tests/data/mergekit has mergekit's merges of."""
    return family(root, 3, torch.float32)


def fusionbench_family(root: Path) -> dict[str, dict[str, Tensor]]:
    """The models that tests/data/fusionbench has FusionBench's merges of. Values are multiples of
    1/4: many task vectors' elements are equal, or cancel each other."""
    sizes = {"layers": 1, "width": 8, "words": 20}
    found = {}
    for i, name in enumerate(("base", "m0", "m1", "m2")):
        state = {n: (t * 4).round() / 4 for n, t in tensors(i, **sizes).items()}
        found[name] = write(root / name, state, torch.float32)
    return found


def load(folder: Path) -> dict[str, Tensor]:
    """The weights of a merged folder, by the safetensors library."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
