"""Small checkpoints of several modules, shaped as T5's, Mistral 3's and Qwen2.5-VL's: for tests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..state_files import write_json
from . import llamas

Shapes = dict[str, tuple[int, ...]]
_WIDTH, _INNER, _WORDS, _TOWER = 8, 12, 20, 6
_SQUARE = (_WIDTH, _WIDTH)
NAMES = ("base", "m0", "m1")


def t5(encoder: int = 3, decoder: int = 2) -> Shapes:
    """Shapes of an encoder and a decoder, of so many layers, with one embedding and a head."""
    found: Shapes = {"shared.weight": (_WORDS, _WIDTH)}
    for stack, layers in (("encoder", encoder), ("decoder", decoder)):
        attentions = ("SelfAttention", "EncDecAttention")[: 1 + (stack == "decoder")]
        for i in range(layers):
            for k, name in enumerate((*attentions, "DenseReluDense")):
                at = f"{stack}.block.{i}.layer.{k}"
                found |= {f"{at}.{name}.{n}.weight": _SQUARE for n in "qkvo" if "Att" in name}
                found[f"{at}.layer_norm.weight"] = (_WIDTH,)
            found |= {f"{at}.DenseReluDense.wi_{n}.weight": (_INNER, _WIDTH) for n in (0, 1)}
            found[f"{at}.DenseReluDense.wo.weight"] = (_WIDTH, _INNER)
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found |= {bias: (4, 2), f"{stack}.final_layer_norm.weight": (_WIDTH,)}
    return found | {"lm_head.weight": (_WORDS, _WIDTH)}


def mistral3(text: int = 2, vision: int = 3) -> Shapes:
    """Shapes of a vision tower, a projector and a language model, of so many layers."""
    at = "multi_modal_projector"
    found: Shapes = {
        f"{at}.linear_1.weight": (_WIDTH, _TOWER),
        f"{at}.linear_2.weight": _SQUARE,
        f"{at}.norm.weight": (_TOWER,),
        f"{at}.patch_merger.merging_layer.weight": (_TOWER, 4 * _TOWER),
        "vision_tower.patch_conv.weight": (_TOWER, 3, 2, 2),
        "vision_tower.ln_pre.weight": (_TOWER,),
    }
    for i in range(vision):
        at = f"vision_tower.transformer.layers.{i}"
        found |= {f"{at}.attention.{n}_proj.weight": (_TOWER, _TOWER) for n in "qkvo"}
        found |= {f"{at}.feed_forward.{n}_proj.weight": (_INNER, _TOWER) for n in ("gate", "up")}
        found[f"{at}.feed_forward.down_proj.weight"] = (_TOWER, _INNER)
        found |= {f"{at}.{n}_norm.weight": (_TOWER,) for n in ("ffn", "attention")}
    language = llamas.shapes(layers=text, width=_WIDTH, words=_WORDS)
    return found | {f"language_model.{name}": shape for name, shape in language.items()}


def qwen2_5_vl(text: int = 2, vision: int = 2) -> Shapes:
    """Shapes of a vision tower that has its projector in it, and a language model."""
    found: Shapes = {"visual.patch_embed.proj.weight": (_TOWER, 3, 2, 2, 2)}
    for i in range(vision):
        at = f"visual.blocks.{i}"
        sizes: dict[str, tuple[int, int]] = {
            "attn.qkv": (3 * _TOWER, _TOWER),
            "attn.proj": (_TOWER, _TOWER),
        }
        sizes |= {f"mlp.{n}_proj": (_INNER, _TOWER) for n in ("gate", "up")}
        sizes["mlp.down_proj"] = (_TOWER, _INNER)
        for name, (rows, columns) in sizes.items():
            found |= {f"{at}.{name}.weight": (rows, columns), f"{at}.{name}.bias": (rows,)}
        found |= {f"{at}.norm{n}.weight": (_TOWER,) for n in (1, 2)}
    merger = "visual.merger"
    found[f"{merger}.ln_q.weight"] = (_TOWER,)
    for k, rows in ((0, 4 * _TOWER), (2, _WIDTH)):
        found |= {f"{merger}.mlp.{k}.weight": (rows, 4 * _TOWER), f"{merger}.mlp.{k}.bias": (rows,)}
    found |= llamas.shapes(layers=text, width=_WIDTH, words=_WORDS)
    for i in range(text):
        found |= {f"model.layers.{i}.self_attn.{n}_proj.bias": (_WIDTH,) for n in "qkv"}
    return found


def _count(shapes: Shapes, stack: str) -> int:
    found = [re.match(rf"{re.escape(stack)}(\d+)\.", name) for name in shapes]
    return 1 + max(int(match[1]) for match in found if match)


def _text(shapes: Shapes, stack: str, kind: str) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": _WIDTH,
        "intermediate_size": 3 * _WIDTH,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": _WIDTH // 2,
        "num_hidden_layers": _count(shapes, stack),
        "vocab_size": _WORDS,
    }


def config(shapes: Shapes) -> dict[str, Any]:
    """What config.json says of a model of these shapes."""
    if "shared.weight" in shapes:
        sizes = {"d_model": _WIDTH, "d_kv": 4, "num_heads": 2, "d_ff": _INNER}
        counts = {
            "num_layers": _count(shapes, "encoder.block."),
            "num_decoder_layers": _count(shapes, "decoder.block."),
        }
        more = {"vocab_size": _WORDS, "feed_forward_proj": "gated-gelu"}
        kind = {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}
        return {**kind, **sizes, **counts, **more, "tie_word_embeddings": False}
    if "visual.patch_embed.proj.weight" in shapes:
        layers = _count(shapes, "visual.blocks.")
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "text_config": _text(shapes, "model.layers.", "qwen2_5_vl_text"),
            "vision_config": {"model_type": "qwen2_5_vl_vision", "depth": layers},
        }
    layers = _count(shapes, "vision_tower.transformer.layers.")
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": _text(shapes, "language_model.model.layers.", "mistral"),
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": _TOWER,
            "intermediate_size": _INNER,
            "num_attention_heads": 1,
            "num_hidden_layers": layers,
            "patch_size": 2,
        },
    }


def family(root: Path, prefix: str, every: Sequence[Shapes]) -> dict[str, Mapping[str, Tensor]]:
    """``PREFIXbase``, ``PREFIXm0`` ...: models near the base where they are as large as it is.

    Args:
        every: shapes, a model each. fp32 values go by a tensor's place among its model's names.
    """
    found: dict[str, Mapping[str, Tensor]] = {}
    base: Mapping[str, Tensor] = {}
    for seed, (name, shapes) in enumerate(zip(NAMES, every, strict=True)):
        g = torch.Generator().manual_seed(seed)
        state = {n: torch.randn(shape, generator=g) for n, shape in shapes.items()}
        state = {n: base[n] + 0.1 * t if n in base else t for n, t in state.items()}
        base = base or state
        folder = root / f"{prefix}{name}"
        found[prefix + name] = llamas.write(folder, state, torch.float32)
        write_json(folder / "config.json", config(shapes))
    return found


def mergekit_family(root: Path) -> dict[str, Mapping[str, Tensor]]:
    """The models that tests/data/mergekit_modules has mergekit's merges of."""
    return {
        **family(root, "t5_", [t5(), t5(), t5(4, 3)]),
        **family(root, "mistral3_", [mistral3(), mistral3(), mistral3(3, 2)]),
        **family(root, "qwen_", [qwen2_5_vl()] * 3),
    }
