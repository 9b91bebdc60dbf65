"""Rules of ``torch.nn``: linear layers, convolutions, norms, and what has no parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...encoders.rules import join
from ..draft import Draft, Units
from ..rules import register

# fmt: off
_ACTIVATIONS = (
    "CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU",
    "LogSigmoid", "LogSoftmax", "Mish", "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softmax",
    "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink", "Threshold",
)
# fmt: on
_LEAVES_UNITS_ALONE = (
    *(f"torch.nn.modules.activation.{name}" for name in _ACTIVATIONS),
    *(f"timm.layers.activations.{name}" for name in ("GELU", "GELUTanh", "QuickGELU", "Sigmoid")),
    "open_clip.transformer.QuickGELU",
    "open_clip.transformer.PatchDropout",
    "torch.nn.modules.linear.Identity",
    *(f"torch.nn.modules.dropout.Dropout{dimensions}" for dimensions in ("", "1d", "2d")),
    "torch.nn.modules.dropout.AlphaDropout",
    "timm.layers.drop.DropBlock2d",
    "timm.layers.drop.DropPath",
    "timm.layers.patch_dropout.PatchDropout",
)
_POOLINGS = (
    *(
        f"torch.nn.modules.pooling.{name}{dimensions}d"
        for name in ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool")
        for dimensions in (1, 2, 3)
    ),
    "timm.layers.blur_pool.BlurPool2d",
)


@register("torch.nn.modules.container.Sequential")
def sequential(draft: Draft, module: Any, path: str, x: Units) -> Units:
    # Not named_children(), which leaves out a module that is there for the second time.
    return draft.chain(module, path, module._modules, x)


@register(*_LEAVES_UNITS_ALONE)
def units_alone(draft: Draft, module: Any, path: str, x: Units) -> Units:
    return x


@register(*_POOLINGS)
def pooling(draft: Draft, module: Any, path: str, x: Units) -> Units:
    draft.expect(x, path, "channels")
    return x


def _mixes_rows(module: Any) -> str | None:
    if (module.start_dim, module.end_dim) == (1, -1):
        return None
    return f"start_dim={module.start_dim}, end_dim={module.end_dim}"


@register("torch.nn.modules.flatten.Flatten", why_not=_mixes_rows)
def flatten(draft: Draft, module: Any, path: str, x: Units) -> Units:
    return flattened(x)


def flattened(x: Units) -> Units:
    """(B, C, ...) -> (B, C * P), or (B, T, C) -> (B, T * C)."""
    if x.layout == "channels":
        return x.at("repeated")
    return x.at("tiled") if x.layout == "last" else x


# -- with parameters ------------------------------------------------------------------------------


@register(
    "torch.nn.modules.linear.Linear", "torch.nn.modules.linear.NonDynamicallyQuantizableLinear"
)
def linear(draft: Draft, module: Any, path: str, x: Units) -> Units:
    draft.expect(x, path, "last", "repeated", "tiled")
    draft.use("in", x, module, path, weight=1)
    made = draft.units(path, module.out_features)
    draft.use("out", made, module, path, weight=0)
    draft.use("vec", made, module, path, bias=0)
    return made


@register("torch.nn.modules.sparse.Embedding")
def embedding(draft: Draft, module: Any, path: str, x: Units) -> Units:
    made = draft.units(path, module.embedding_dim)
    draft.use("out", made, module, path, weight=1)
    return made


@register(*(f"torch.nn.modules.conv.Conv{dimensions}d" for dimensions in (1, 2, 3)))
def convolution(draft: Draft, module: Any, path: str, x: Units) -> Units:
    draft.expect(x, path, "channels")
    groups = module.groups
    if groups == module.in_channels == module.out_channels and x.size is not None:
        made = x  # depthwise: a channel goes its own way
    else:
        made = draft.units(path, module.out_channels, blocks=groups, layout="channels")
        if groups > 1:
            draft.split(x, groups, path)
            draft.tie(x, made)
        # All groups read their inputs with the same columns, which therefore have one order.
        draft.use("in", x.inside() if groups > 1 else x, module, path, weight=1)
    draft.use("out", made, module, path, weight=0)
    draft.use("vec", made, module, path, bias=0)
    return made


@register("torch.nn.modules.activation.PReLU")
def prelu(draft: Draft, module: Any, path: str, x: Units) -> Units:
    if module.num_parameters > 1:
        draft.use("vec", x, module, path, weight=0)
    return x


# -- norms ----------------------------------------------------------------------------------------


def _without_statistics(module: Any) -> str | None:
    return "track_running_stats=False" if module.running_mean is None else None


@register(
    *(f"torch.nn.modules.batchnorm.BatchNorm{dimensions}d" for dimensions in (1, 2, 3)),
    "torch.nn.modules.batchnorm.SyncBatchNorm",
    "torchvision.ops.misc.FrozenBatchNorm2d",
    why_not=_without_statistics,
)
def batch_norm(draft: Draft, module: Any, path: str, x: Units) -> Units:
    draft.use("vec", x, module, path, weight=0, bias=0)
    draft.use("stat", x, module, path, running_mean=0, running_var=0)
    return x


@register("timm.layers.norm_act.BatchNormAct2d", why_not=_without_statistics)
def batch_norm_act(draft: Draft, module: Any, path: str, x: Units) -> Units:
    return draft.chain(module, path, ["drop", "act"], batch_norm(draft, module, path, x))


@register("torch.nn.modules.normalization.GroupNorm", "timm.layers.norm.GroupNorm")
def group_norm(draft: Draft, module: Any, path: str, x: Units) -> Units:
    draft.expect(x, path, "channels", "last")
    draft.split(x, module.num_groups, path)
    draft.use("vec", x, module, path, weight=0, bias=0)
    return x


@register("timm.layers.norm_act.GroupNormAct")
def group_norm_act(draft: Draft, module: Any, path: str, x: Units) -> Units:
    return draft.chain(module, path, ["drop", "act"], group_norm(draft, module, path, x))


@register("timm.layers.norm.LayerNorm2d", "timm.layers.norm.RmsNorm2d")
def layer_norm_2d(draft: Draft, module: Any, path: str, x: Units) -> Units:
    draft.expect(x, path, "channels")
    draft.use("vec", x, module, path, weight=0, bias=0)
    return x


@register(
    "torch.nn.modules.normalization.LayerNorm",
    "torch.nn.modules.normalization.RMSNorm",
    "open_clip.transformer.LayerNorm",
    "open_clip.transformer.LayerNormFp32",
    "timm.layers.norm.LayerNorm",
    "timm.layers.norm.LayerNormFp32",
    "timm.layers.norm.RmsNorm",
    "timm.layers.norm.RmsNormFp32",
)
def layer_norm(draft: Draft, module: Any, path: str, x: Units) -> Units:
    dimensions = len(module.normalized_shape)
    if x.layout == "channels" and dimensions == 1:
        draft.expect(x, path, "last")
    axis = 0 if x.layout == "channels" else dimensions - 1
    draft.use("vec", x, module, path, weight=axis, bias=axis)
    return x


def residual(
    draft: Draft, module: nn.Module, path: str, branches: list[list[str]], x: Units
) -> Units:
    """x + f(x) for every branch f of submodules, one after the other."""
    for names in branches:
        x = draft.join(x, draft.chain(module, path, names, x))
    return x


def heads(draft: Draft, path: str, size: int, count: int) -> tuple[Units, Units]:
    """Units of queries and keys, and of values: heads in one order, any order inside a head."""
    qk = draft.units(join(path, "qk"), size, blocks=count)
    vo = draft.units(join(path, "vo"), size, blocks=count)
    draft.tie(qk, vo)
    return qk, vo
