"""open_clip's towers (open_clip/transformer.py, modified_resnet.py, model.py)."""

from __future__ import annotations

from typing import Any

from ...encoders.rules import join
from ..draft import Draft, Units
from ..rules import register
from .attention import multihead
from .layers import heads, residual

_MODULE = "open_clip.transformer."
_RESNET = "open_clip.modified_resnet."


def _pools_twice(module: Any) -> str | None:
    if getattr(module, "attn_pool_contrastive", None) is None:
        return None
    return f"attentional_pool={module.attn_pool_type!r}"


@register(_MODULE + "VisionTransformer", why_not=_pools_twice)
def vision_transformer(draft: Draft, module: Any, path: str, x: Units) -> Units:
    x = draft.child(module, path, "conv1", x).at("last")
    draft.use("vec", x, module, path, class_embedding=0)
    draft.use("out", x, module, path, positional_embedding=1)
    x = draft.chain(module, path, ["ln_pre", "transformer", "attn_pool", "ln_post"], x)
    if module.output_tokens:
        draft.fix(x)
    if module.proj is None:
        return x
    draft.use("in", x, module, path, proj=0)
    made = draft.units(join(path, "proj"), module.proj.shape[1])
    draft.use("out", made, module, path, proj=1)
    return made


@register(_MODULE + "Transformer")
def transformer(draft: Draft, module: Any, path: str, x: Units) -> Units:
    names = [f"{k}" for k in range(len(module.resblocks))]
    return draft.chain(module.resblocks, join(path, "resblocks"), names, x)


def _crosses(module: Any) -> str | None:
    return "is_cross_attention=True" if hasattr(module, "ln_1_kv") else None


@register(_MODULE + "ResidualAttentionBlock", why_not=_crosses)
def block(draft: Draft, module: Any, path: str, x: Units) -> Units:
    return residual(draft, module, path, [["ln_1", "attn", "ls_1"], ["ln_2", "mlp", "ls_2"]], x)


@register(_MODULE + "CustomResidualAttentionBlock")
def custom_block(draft: Draft, module: Any, path: str, x: Units) -> Units:
    branches = [["ln_1", "attn", "ln_attn", "ls_1"], ["ln_2", "mlp", "ls_2"]]
    return residual(draft, module, path, branches, x)


@register(_MODULE + "LayerScale", "timm.layers.layer_scale.LayerScale")
def layer_scale(draft: Draft, module: Any, path: str, x: Units) -> Units:
    draft.use("vec", x, module, path, gamma=0)
    return x


def _cosine(module: Any) -> str | None:
    return None if module.logit_scale is None else "scaled_cosine=True"


@register(_MODULE + "Attention", why_not=_cosine)
def attention(draft: Draft, module: Any, path: str, x: Units) -> Units:
    d = module.out_proj.in_features
    draft.use("in", x, module, path, in_proj_weight=1)
    qk, vo = heads(draft, path, d, module.num_heads)
    for k, made in enumerate((qk, qk, vo)):
        part = made.entries(k * d, (k + 1) * d)
        draft.use("out", part, module, path, in_proj_weight=0)
        draft.use("vec", part, module, path, in_proj_bias=0)
    for name in ("ln_q", "ln_k"):
        draft.child(module, path, name, qk.inside())
    if module.head_scale is not None:
        scales = draft.units(join(path, "head_scale"), module.num_heads, blocks=module.num_heads)
        draft.tie(vo, scales)
        draft.use("vec", scales, module, path, head_scale=0)
    return draft.chain(module, path, ["ln_inner", "out_proj"], vo)


@register(_MODULE + "AttentionalPooler")
def attentional_pooler(draft: Draft, module: Any, path: str, x: Units) -> Units:
    query = draft.units(join(path, "query"), module.query.shape[1])
    draft.use("out", query, module, path, query=1)
    query = draft.child(module, path, "ln_q", query)
    memory = draft.child(module, path, "ln_k", x)
    return multihead(draft, module.attn, join(path, "attn"), query, memory)


# -- ModifiedResNet -------------------------------------------------------------------------------


@register(_RESNET + "ModifiedResNet")
def modified_resnet(draft: Draft, module: Any, path: str, x: Units) -> Units:
    stem = [f"{kind}{k}" for k in (1, 2, 3) for kind in ("conv", "bn", "act")]
    stages = ["avgpool", "layer1", "layer2", "layer3", "layer4", "attnpool"]
    return draft.chain(module, path, [*stem, *stages], x)


@register(_RESNET + "AttentionPool2d")
def attention_pool(draft: Draft, module: Any, path: str, x: Units) -> Units:
    x = x.at("last")
    draft.use("out", x, module, path, positional_embedding=1)
    qk, vo = heads(draft, path, module.q_proj.out_features, module.num_heads)
    for name, units in (("q_proj", qk), ("k_proj", qk), ("v_proj", vo)):
        draft.join(units, draft.child(module, path, name, x))
    return draft.child(module, path, "c_proj", vo)


# -- whole models ---------------------------------------------------------------------------------


@register("open_clip.model.CLIP", "open_clip.model.CustomTextCLIP")
def clip(draft: Draft, module: Any, path: str, x: Units) -> Units:
    """The image tower; the text tower is left as it is."""
    return draft.child(module, path, "visual", x)


@register("open_clip.timm_model.TimmModel")
def timm_model(draft: Draft, module: Any, path: str, x: Units) -> Units:
    return draft.chain(module, path, ["trunk", "head"], x)
