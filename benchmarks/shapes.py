"""Sizes that benchmarks use: the tensors of known models, and experts of that shape in an arena."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from neulig_fast.segments import Segments

_TILE = 4_194_301  # prime, so that no two tensors begin alike
_VOCABULARY = {512: 49408, 768: 49408}  # by text width; a toy has 64 tokens
Named = tuple[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A network by its name and the (name, shape) of its tensors."""

    name: str
    tensors: Callable[[], Iterator[Named]]


def clip_tensors(
    embed: int, image: int, patch: int, vision: tuple[int, int], text: tuple[int, int]
) -> Iterator[Named]:
    """(name, shape) of every tensor of an open_clip CLIP ViT, in state-dict order."""
    (v, v_layers), (t, t_layers) = vision, text
    yield "positional_embedding", (77, t)
    yield "text_projection", (t, embed)
    yield "logit_scale", ()
    yield "visual.class_embedding", (v,)
    yield "visual.positional_embedding", ((image // patch) ** 2 + 1, v)
    yield "visual.proj", (v, embed)
    yield "visual.conv1.weight", (v, 3, patch, patch)
    yield from _norm("visual.ln_pre", v)
    yield from _blocks("visual.transformer", v, v_layers)
    yield from _norm("visual.ln_post", v)
    yield from _blocks("transformer", t, t_layers)
    yield "token_embedding.weight", (_VOCABULARY.get(t, 64), t)
    yield from _norm("ln_final", t)


def _norm(name: str, width: int) -> Iterator[Named]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _blocks(name: str, width: int, layers: int) -> Iterator[Named]:
    for i in range(layers):
        block = f"{name}.resblocks.{i}"
        yield from _norm(f"{block}.ln_1", width)
        yield f"{block}.attn.in_proj_weight", (3 * width, width)
        yield f"{block}.attn.in_proj_bias", (3 * width,)
        yield f"{block}.attn.out_proj.weight", (width, width)
        yield f"{block}.attn.out_proj.bias", (width,)
        yield from _norm(f"{block}.ln_2", width)
        yield f"{block}.mlp.c_fc.weight", (4 * width, width)
        yield f"{block}.mlp.c_fc.bias", (4 * width,)
        yield f"{block}.mlp.c_proj.weight", (width, 4 * width)
        yield f"{block}.mlp.c_proj.bias", (width,)


def decoder_tensors(width: int, layers: int, mlp: int, kv: int, vocabulary: int) -> Iterator[Named]:
    """(name, shape) of a Qwen2 decoder with grouped queries and tied embeddings."""
    yield "model.embed_tokens.weight", (vocabulary, width)
    for i in range(layers):
        layer = f"model.layers.{i}"
        for part, rows in (("q", width), ("k", kv), ("v", kv)):
            yield f"{layer}.self_attn.{part}_proj.weight", (rows, width)
            yield f"{layer}.self_attn.{part}_proj.bias", (rows,)
        yield f"{layer}.self_attn.o_proj.weight", (width, width)
        yield f"{layer}.mlp.gate_proj.weight", (mlp, width)
        yield f"{layer}.mlp.up_proj.weight", (mlp, width)
        yield f"{layer}.mlp.down_proj.weight", (width, mlp)
        yield f"{layer}.input_layernorm.weight", (width,)
        yield f"{layer}.post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)


def _clip(name: str, **sizes: Any) -> Shape:
    return Shape(name, functools.partial(clip_tensors, **sizes))


# tests/test_benchmarks.py compares the CLIP models with open_clip's.
VIT_B_32 = _clip("ViT-B-32", embed=512, image=224, patch=32, vision=(768, 12), text=(512, 12))
VIT_L_14 = _clip("ViT-L-14", embed=768, image=224, patch=14, vision=(1024, 24), text=(768, 12))
QWEN_1_5B = Shape(
    "Qwen2.5-1.5B",
    functools.partial(decoder_tensors, width=1536, layers=28, mlp=8960, kv=256, vocabulary=151936),
)
TOY = _clip("toy", embed=16, image=8, patch=4, vision=(32, 2), text=(16, 1))
SHAPES = {shape.name: shape for shape in (TOY, VIT_B_32, VIT_L_14, QWEN_1_5B)}


def layout(shape: Shape, dtype: torch.dtype) -> Segments:
    """The arena layout of these tensors: each starts on a 128-byte boundary."""
    tensors = ((name, size, dtype, "parameter") for name, size in shape.tensors())
    return Segments.pack(tensors, 128 // dtype.itemsize)


@dataclasses.dataclass(frozen=True)
class Experts:
    """N experts in one arena ``params`` (N, P), and the same memory as N state dicts of views."""

    params: Tensor
    segments: Segments

    @property
    def state_dicts(self) -> list[dict[str, Tensor]]:
        return [row_views(row, self.segments) for row in self.params]


def row_views(row: Tensor, segments: Segments) -> dict[str, Tensor]:
    """One arena row (P,) as a state dict of views."""
    return {s.name: row[s.start : s.start + s.length].view(s.shape) for s in segments}


def make_experts(count: int, segments: Segments, dtype: torch.dtype, device: str) -> Experts:
    """Experts that differ from each other by about 5 % of their size, as fine-tuned ones do."""
    noise = torch.randn(_TILE + 4099 * count, generator=torch.Generator().manual_seed(0))
    params = torch.empty(count, segments.width, dtype=dtype, device=device)
    for i, row in enumerate(params):
        # One tile of noise over and over: drawing 2.4e9 normals would take minutes.
        tile = noise[:_TILE] + 0.05 * noise[4099 * i :][:_TILE].flip(0)
        tile = tile.to(device, dtype)
        for part in row.split(_TILE):
            part.copy_(tile[: len(part)])
    for segment, stop in zip(segments, segments.bounds[1:].tolist(), strict=True):
        params[:, segment.start + segment.length : stop] = 0  # the padding
    return Experts(params, segments)
