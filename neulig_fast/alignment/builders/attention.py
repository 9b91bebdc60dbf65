"""``torch.nn``'s attention and the transformer layers made of it."""

from __future__ import annotations

from typing import Any

from ...encoders.rules import join
from ..draft import Draft, Units
from ..rules import register
from .layers import heads, residual


def multihead(draft: Draft, module: Any, path: str, query: Units, memory: Units) -> Units:
    """``MultiheadAttention`` of query over memory."""
    d = module.embed_dim
    draft.expect(query, path, "last")
    draft.expect(memory, path, "last")
    qk, vo = heads(draft, path, d, module.num_heads)
    for k, (name, made, given) in enumerate(
        [("q", qk, query), ("k", qk, memory), ("v", vo, memory)]
    ):
        part = made.entries(k * d, (k + 1) * d)
        draft.use("out", part, module, path, in_proj_weight=0)
        draft.use("vec", part, module, path, in_proj_bias=0)
        draft.use("in", given, module, path, in_proj_weight=1)
        draft.use("out", made, module, path, **{f"{name}_proj_weight": 0})
        draft.use("in", given, module, path, **{f"{name}_proj_weight": 1})
    return draft.child(module, path, "out_proj", vo)


def _adds_keys(module: Any) -> str | None:
    return "add_bias_kv=True" if module.bias_k is not None else None


@register("torch.nn.modules.activation.MultiheadAttention", why_not=_adds_keys)
def self_attention(draft: Draft, module: Any, path: str, x: Units) -> Units:
    return multihead(draft, module, path, x, x)


@register("torch.nn.modules.transformer.TransformerEncoderLayer")
def encoder_layer(draft: Draft, module: Any, path: str, x: Units) -> Units:
    attention, mlp = ["self_attn", "dropout1"], ["linear1", "dropout", "linear2", "dropout2"]
    if module.norm_first:
        return residual(draft, module, path, [["norm1", *attention], ["norm2", *mlp]], x)
    x = draft.child(module, path, "norm1", residual(draft, module, path, [attention], x))
    return draft.child(module, path, "norm2", residual(draft, module, path, [mlp], x))


@register("torch.nn.modules.transformer.TransformerEncoder")
def encoder(draft: Draft, module: Any, path: str, x: Units) -> Units:
    names = [f"{k}" for k in range(len(module.layers))]
    x = draft.chain(module.layers, join(path, "layers"), names, x)
    return draft.chain(module, path, ["norm"], x)
