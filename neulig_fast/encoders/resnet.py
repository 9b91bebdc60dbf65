"""ResNets: open_clip's ModifiedResNet (open_clip/modified_resnet.py) and torchvision's ResNet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import attend, merge_heads, split_heads
from .rules import register
from .runs import Run
from .torch_layers import chain
from .transformers import as_tokens, with_tokens

_CLIP = "open_clip.modified_resnet."
_VISION = "torchvision.models.resnet."
_LAYERS = ["layer1", "layer2", "layer3", "layer4"]


@register(_CLIP + "ModifiedResNet")
def modified_resnet(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    stem = [f"{kind}{k}" for k in (1, 2, 3) for kind in ("conv", "bn", "act")]
    return chain(run, module, path, [*stem, "avgpool", *_LAYERS, "attnpool"], x)


@register(_CLIP + "Bottleneck")
def modified_bottleneck(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    names = ["conv1", "bn1", "act1", "conv2", "bn2", "act2", "avgpool", "conv3", "bn3"]
    return run.child(module, path, "act3", _block_sum(run, module, path, names, x))


@register(_CLIP + "AttentionPool2d")
def attention_pool(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    """Only the first token's output is used, so only its query is formed."""
    (positions,) = run.stacks(module, path, "positional_embedding")
    x = as_tokens(x)
    x = run.add(with_tokens(x, x.mean(1, keepdim=True)), positions)
    inputs = {"q_proj": x[:, :1], "k_proj": x, "v_proj": x}
    q, k, v = (
        split_heads(run.child(module, path, name, tokens), module.num_heads)
        for name, tokens in inputs.items()
    )
    return run.child(module, path, "c_proj", merge_heads(attend(q, k, v))[:, 0])


@register(_VISION + "ResNet")
def resnet(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    names = ["conv1", "bn1", "relu", "maxpool", *_LAYERS, "avgpool"]
    x = chain(run, module, path, names, x)
    return run.child(module, path, "fc", torch.flatten(x, 1))


@register(_VISION + "BasicBlock")
def basic_block(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    names = ["conv1", "bn1", "relu", "conv2", "bn2"]
    return F.relu(_block_sum(run, module, path, names, x))


@register(_VISION + "Bottleneck")
def bottleneck(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    names = ["conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3"]
    return F.relu(_block_sum(run, module, path, names, x))


def _block_sum(run: Run, module: Any, path: str, names: list[str], x: Tensor) -> Tensor:
    """What ``names`` make of x, plus x itself as the block hands it on."""
    beside = x if module.downsample is None else run.child(module, path, "downsample", x)
    return chain(run, module, path, names, x) + beside
