"""timm's VisionTransformer (timm/models/vision_transformer.py) and the layers it is made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from .attention import attend, merge_heads, split_heads
from .rules import register, where
from .runs import Run
from .torch_layers import chain
from .transformers import as_tokens, residual_branches, with_tokens

_POOLINGS = {
    "token": lambda tokens, patches: tokens[:, 0],
    "avg": lambda tokens, patches: patches.mean(1),
    "max": lambda tokens, patches: patches.amax(1),
    "avgmax": lambda tokens, patches: 0.5 * (patches.amax(1) + patches.mean(1)),
}


def _why_not(module: Any) -> str | None:
    if module.dynamic_img_size:
        return "dynamic_img_size=True"
    if module.attn_pool is None and module.global_pool not in _POOLINGS:
        return f"global_pool={module.global_pool!r}, which gives no (B, D)"
    return None


@register("timm.models.vision_transformer.VisionTransformer", why_not=_why_not)
def vision_transformer(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    x = _with_positions(run, module, path, run.child(module, path, "patch_embed", x))
    x = chain(run, module, path, ["patch_drop", "norm_pre", "blocks", "norm"], x)
    patches = x if module.pool_include_prefix else x[:, module.num_prefix_tokens :]
    if module.attn_pool is None:
        x = _POOLINGS[module.global_pool](x, patches)
    else:
        x = run.child(module, path, "attn_pool", patches)
    return chain(run, module, path, ["fc_norm", "head"], x)


def _with_positions(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    stacks = run.stacks(module, path, "cls_token", "reg_token", "pos_embed")
    *tokens, positions = (None if stack is None else stack[:, 0] for stack in stacks)
    tokens = [run.per_row(token) for token in tokens if token is not None]
    if positions is not None and module.no_embed_class:
        return with_tokens(run.add(x, positions), *tokens)
    x = with_tokens(x, *tokens)
    return x if positions is None else run.add(x, positions)


def _resizes(module: Any) -> str | None:
    if module.dynamic_img_pad:
        return "dynamic_img_pad=True"
    return None if module.flatten else f"output_fmt={module.output_fmt}"


@register("timm.layers.patch_embed.PatchEmbed", why_not=_resizes)
def patch_embed(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    if module.img_size is not None and (wanted := _other_size(module, x.shape[-2:])):
        raise ValueError(f"{where(path)}: images must be {wanted}, got {_by(x.shape[-2:])}")
    return run.child(module, path, "norm", as_tokens(run.child(module, path, "proj", x)))


def _other_size(module: Any, size: Iterable[int]) -> str | None:
    """What ``PatchEmbed`` asks of an image beside the number of patches, if ``size`` is not so."""
    if module.strict_img_size:
        return None if tuple(size) == tuple(module.img_size) else _by(module.img_size)
    whole = all(n % step == 0 for n, step in zip(size, module.patch_size, strict=True))
    return None if whole else f"of whole {_by(module.patch_size)} patches"


def _by(size: Iterable[int]) -> str:
    return " x ".join(map(str, size))


@register("timm.models.vision_transformer.Block")
def block(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    branches = [["norm1", "attn", "ls1"], ["norm2", "mlp", "ls2"]]
    return residual_branches(run, module, path, branches, x)


@register("timm.layers.attention.Attention")
def attention(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    q, k, v = (
        split_heads(part, module.num_heads)
        for part in run.child(module, path, "qkv", x).chunk(3, -1)
    )
    q, k = run.child(module, path, "q_norm", q), run.child(module, path, "k_norm", k)
    y = run.child(module, path, "norm", merge_heads(attend(q, k, v)))
    if module.gate is not None:
        y = y * run.child(module, path, "gate", x).sigmoid()
    return run.child(module, path, "proj", y)


@register("timm.layers.mlp.Mlp")
def mlp(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    return chain(run, module, path, ["fc1", "act", "drop1", "norm", "fc2", "drop2"], x)


def _no_vector(module: Any) -> str | None:
    return None if module.pool in ("token", "avg") else f"pool_type={module.pool!r}"


@register("timm.layers.attention_pool.AttentionPoolLatent", why_not=_no_vector)
def attention_pool(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    latent, positions = run.stacks(module, path, "latent", "pos_embed")
    if positions is not None:
        x = run.add(x, positions)
    query = run.child(module, path, "q", run.per_row(latent[:, 0]))
    parts = (query, *run.child(module, path, "kv", x).chunk(2, -1))
    q, k, v = (split_heads(part, module.num_heads) for part in parts)
    q, k = run.child(module, path, "q_norm", q), run.child(module, path, "k_norm", k)
    x = run.child(module, path, "proj", merge_heads(attend(q, k, v)))
    if module.mlp is not None:
        x = residual_branches(run, module, path, [["norm", "mlp"]], x)
    return x[:, 0] if module.pool == "token" else x.mean(1)
