"""open_clip's VisionTransformer, the image tower of its CLIP models (open_clip/transformer.py)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .attention import attend, merge_heads, multihead, split_heads
from .rules import register
from .runs import Run
from .torch_layers import chain
from .transformers import as_tokens, residual_branches, with_tokens

_MODULE = "open_clip.transformer."


def _no_vector(module: Any) -> str | None:
    if module.pool_type != "none":
        return None
    pooling = getattr(module, "attn_pool_type", "none")
    return f"pooling {pooling!r}, which gives several vectors per image"


@register(_MODULE + "VisionTransformer", why_not=_no_vector)
def vision_transformer(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    token, positions, proj = run.stacks(
        module, path, "class_embedding", "positional_embedding", "proj"
    )
    x = as_tokens(run.child(module, path, "conv1", x))
    x = run.add(with_tokens(x, run.per_row(token)[:, None]), positions)
    x = chain(run, module, path, ["patch_dropout", "ln_pre", "transformer"], x)
    if module.attn_pool is not None:
        x = run.child(module, path, "attn_pool", x)
    # The norm of picked tokens is the picked norm of tokens; that of a mean is not.
    if module.pool_type == "tok" or (module.final_ln_after_pool and module.attn_pool is None):
        x = run.child(module, path, "ln_post", _pooled(module, x))
    else:
        x = _pooled(module, run.child(module, path, "ln_post", x))
    if proj is None:
        return x
    # (width, D), and layers want (D, width) in rows that are contiguous: a copy of a small matrix.
    return run.linear(x, proj.transpose(1, 2).contiguous())


def _pooled(module: Any, x: Tensor) -> Tensor:
    return x[:, 0] if module.pool_type == "tok" else x[:, 1:].mean(1)


@register(_MODULE + "Transformer")
def transformer(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    """Tokens are in dimension 1 whatever ``batch_first`` says, here and in the blocks."""
    return chain(run, module, path, [f"resblocks.{k}" for k in range(len(module.resblocks))], x)


def _crosses(module: Any) -> str | None:
    return "is_cross_attention=True" if hasattr(module, "ln_1_kv") else None


@register(_MODULE + "ResidualAttentionBlock", why_not=_crosses)
def block(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    branches = [["ln_1", "attn", "ls_1"], ["ln_2", "mlp", "ls_2"]]
    return residual_branches(run, module, path, branches, x)


@register(_MODULE + "CustomResidualAttentionBlock")
def custom_block(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    branches = [["ln_1", "attn", "ln_attn", "ls_1"], ["ln_2", "mlp", "ls_2"]]
    return residual_branches(run, module, path, branches, x)


@register(_MODULE + "LayerScale", "timm.layers.layer_scale.LayerScale")
def layer_scale(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    return run.scale(x, *run.stacks(module, path, "gamma"))


def _cosine(module: Any) -> str | None:
    return None if module.logit_scale is None else "scaled_cosine=True"


@register(_MODULE + "Attention", why_not=_cosine)
def attention(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    weight, bias, head_scale = run.stacks(
        module, path, "in_proj_weight", "in_proj_bias", "head_scale"
    )
    q, k, v = (
        split_heads(part, module.num_heads) for part in run.linear(x, weight, bias).chunk(3, -1)
    )
    x = attend(run.child(module, path, "ln_q", q), run.child(module, path, "ln_k", k), v)
    if head_scale is not None:
        x = run.scale(x, head_scale)
    return chain(run, module, path, ["ln_inner", "out_proj"], merge_heads(x))


@register(_MODULE + "AttentionalPooler")
def attentional_pooler(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    (query,) = run.stacks(module, path, "query")
    query = run.child(module, path, "ln_q", run.per_row(query))
    memory = run.child(module, path, "ln_k", x)
    return multihead(run, module.attn, f"{path}.attn", query, memory)
