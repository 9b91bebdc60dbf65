"""Residual networks of torchvision, timm and open_clip; of BatchNorm or GroupNorm alike."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..draft import Draft, Units
from ..rules import register
from .layers import flattened

_VISION = "torchvision.models.resnet."
_TIMM = "timm.models.resnet."
_STAGES = ["layer1", "layer2", "layer3", "layer4"]


@register(_VISION + "ResNet")
def resnet(draft: Draft, module: Any, path: str, x: Units) -> Units:
    names = ["conv1", "bn1", "relu", "maxpool", *_STAGES, "avgpool"]
    return draft.child(module, path, "fc", flattened(draft.chain(module, path, names, x)))


@register(_TIMM + "ResNet")
def timm_resnet(draft: Draft, module: Any, path: str, x: Units) -> Units:
    names = ["conv1", "bn1", "act1", "maxpool", *_STAGES, "global_pool", "fc"]
    return draft.chain(module, path, names, x)


@register(_VISION + "BasicBlock")
def basic_block(draft: Draft, module: Any, path: str, x: Units) -> Units:
    return _sum(draft, module, path, ["conv1", "bn1", "relu", "conv2", "bn2"], x)


@register(_VISION + "Bottleneck")
def bottleneck(draft: Draft, module: Any, path: str, x: Units) -> Units:
    names = ["conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3"]
    return _sum(draft, module, path, names, x)


@register("open_clip.modified_resnet.Bottleneck")
def modified_bottleneck(draft: Draft, module: Any, path: str, x: Units) -> Units:
    names = ["conv1", "bn1", "act1", "conv2", "bn2", "act2", "avgpool", "conv3", "bn3"]
    return _sum(draft, module, path, names, x)


@register(_TIMM + "BasicBlock")
def timm_basic_block(draft: Draft, module: Any, path: str, x: Units) -> Units:
    names = ["conv1", "bn1", "drop_block", "act1", "aa", "conv2", "bn2", "se"]
    return draft.child(module, path, "act2", _sum(draft, module, path, names, x))


@register(_TIMM + "Bottleneck")
def timm_bottleneck(draft: Draft, module: Any, path: str, x: Units) -> Units:
    names = ["conv1", "bn1", "act1", "conv2", "bn2", "drop_block", "act2", "aa", "conv3", "bn3"]
    return draft.child(module, path, "act3", _sum(draft, module, path, [*names, "se"], x))


def _sum(draft: Draft, module: Any, path: str, names: list[str], x: Units) -> Units:
    """What ``names`` make of x, joined to x itself as the block hands it on."""
    made = draft.chain(module, path, names, x)
    return draft.join(draft.chain(module, path, ["downsample"], x), made)


@register("timm.layers.squeeze_excite.SEModule")
def squeeze_excite(draft: Draft, module: Any, path: str, x: Units) -> Units:
    return draft.join(x, draft.chain(module, path, ["fc1", "bn", "act", "fc2", "gate"], x))


def _concatenates(module: Any) -> str | None:
    if "cat" not in module.pool_type:
        return None
    return f"pool_type={module.pool_type!r}"


@register("timm.layers.adaptive_avgmax_pool.SelectAdaptivePool2d", why_not=_concatenates)
def select_pool(draft: Draft, module: Any, path: str, x: Units) -> Units:
    draft.expect(x, path, "channels")
    flat = isinstance(module.flatten, nn.Flatten) or getattr(module.pool, "flatten", False)
    return flattened(x) if flat else x
