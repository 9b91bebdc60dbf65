"""Sizes that benchmarks use: the tensors of CLIP models, and experts of that shape in one arena."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from neulig_fast.segments import Segments

# The arguments of clip_tensors. tests/test_benchmarks.py compares ViT-B-32 with open_clip's.
VIT_B_32 = {"embed": 512, "image": 224, "patch": 32, "vision": (768, 12), "text": (512, 12)}
TOY = {"embed": 16, "image": 8, "patch": 4, "vision": (32, 2), "text": (16, 1)}
_TILE = 4_194_301  # prime, so that no two tensors begin alike
_VOCABULARY = {512: 49408}  # by text width; a toy has 64 tokens


def clip_tensors(
    embed: int, image: int, patch: int, vision: tuple[int, int], text: tuple[int, int]
) -> Iterator[tuple[str, tuple[int, ...]]]:
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


def _norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _blocks(name: str, width: int, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
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


def layout(size: dict, dtype: torch.dtype) -> Segments:
    """The arena layout of these tensors: each starts on a 128-byte boundary."""
    tensors = ((name, shape, dtype, "parameter") for name, shape in clip_tensors(**size))
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
