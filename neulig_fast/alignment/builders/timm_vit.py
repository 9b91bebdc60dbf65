"""timm's VisionTransformer (timm/models/vision_transformer.py) and the layers it is made of."""

from __future__ import annotations

from typing import Any

from ...encoders.rules import join
from ..draft import Draft, Units
from ..rules import register
from .layers import heads, residual


@register("timm.models.vision_transformer.VisionTransformer")
def vision_transformer(draft: Draft, module: Any, path: str, x: Units) -> Units:
    x = draft.child(module, path, "patch_embed", x)
    draft.use("out", x, module, path, cls_token=2, reg_token=2, pos_embed=2)
    names = ["patch_drop", "norm_pre", "blocks", "norm", "attn_pool", "fc_norm", "head"]
    return draft.chain(module, path, names, x)


@register("timm.layers.patch_embed.PatchEmbed")
def patch_embed(draft: Draft, module: Any, path: str, x: Units) -> Units:
    x = draft.child(module, path, "proj", x).at("last")
    return draft.child(module, path, "norm", x)


@register("timm.models.vision_transformer.Block")
def block(draft: Draft, module: Any, path: str, x: Units) -> Units:
    return residual(draft, module, path, [["norm1", "attn", "ls1"], ["norm2", "mlp", "ls2"]], x)


@register("timm.layers.mlp.Mlp")
def mlp(draft: Draft, module: Any, path: str, x: Units) -> Units:
    return draft.chain(module, path, ["fc1", "act", "norm", "fc2"], x)


@register("timm.layers.attention.Attention")
def attention(draft: Draft, module: Any, path: str, x: Units) -> Units:
    qk, vo = heads(draft, path, module.attn_dim, module.num_heads)
    _fused(draft, module.qkv, join(path, "qkv"), x, [qk, qk, vo])
    for name in ("q_norm", "k_norm"):
        draft.child(module, path, name, qk.inside())
    return _output(draft, module, path, x, vo)


def _fused(draft: Draft, layer: Any, path: str, x: Units, made: list[Units]) -> None:
    """A linear layer that makes equal parts one after the other."""
    draft.use("in", x, layer, path, weight=1)
    size = layer.out_features // len(made)
    for k, units in enumerate(made):
        part = units.entries(k * size, (k + 1) * size)
        draft.use("out", part, layer, path, weight=0)
        draft.use("vec", part, layer, path, bias=0)


def _output(draft: Draft, module: Any, path: str, x: Units, vo: Units) -> Units:
    vo = draft.child(module, path, "norm", vo)
    if module.gate is not None:
        draft.join(vo, draft.child(module, path, "gate", x))
    return draft.child(module, path, "proj", vo)


def _shares_keys(module: Any) -> str | None:
    return None if module.num_kv_groups == 1 else f"num_kv_heads={module.num_kv_heads}"


@register("timm.layers.attention.AttentionRope", why_not=_shares_keys)
def rotary_attention(draft: Draft, module: Any, path: str, x: Units) -> Units:
    """A rotary embedding tells the units of a head apart: heads of q and k move as a whole."""
    _, vo = heads(draft, path, module.attn_dim, module.num_heads)
    whole = draft.units(join(path, "heads"), module.num_heads, module.num_heads, "repeated")
    draft.tie(vo, whole)
    if module.qkv is not None:
        _fused(draft, module.qkv, join(path, "qkv"), x, [whole, whole, vo])
    else:
        for name, made in (("q_proj", whole), ("k_proj", whole), ("v_proj", vo)):
            _fused(draft, module.get_submodule(name), join(path, name), x, [made])
    return _output(draft, module, path, x, vo)


@register("timm.layers.attention_pool.AttentionPoolLatent")
def attention_pool(draft: Draft, module: Any, path: str, x: Units) -> Units:
    draft.use("out", x, module, path, pos_embed=1)
    latent = draft.units(join(path, "latent"), module.latent_dim)
    draft.use("out", latent, module, path, latent=2)
    qk, vo = heads(draft, path, module.head_dim * module.num_heads, module.num_heads)
    draft.join(qk, draft.child(module, path, "q", latent))
    _fused(draft, module.kv, join(path, "kv"), x, [qk, vo])
    for name in ("q_norm", "k_norm"):
        draft.child(module, path, name, qk.inside())
    x = draft.child(module, path, "proj", vo)
    return x if module.mlp is None else residual(draft, module, path, [["norm", "mlp"]], x)
