"""Image encoders of open_clip's architecture with random weights, for several benchmarks."""

from __future__ import annotations

import torch
from torch import nn

DEMO = {"image_size": 32, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32}
TOY = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
VIT_B_32 = {"image_size": 224, "patch_size": 32, "width": 768, "layers": 12}
TOY_RN = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
RN50 = {"image_size": 224, "layers": [3, 4, 6, 3], "width": 64}


def image_tower(embed: int, vision: dict, seed: int, device: str) -> nn.Module:
    """A randomly initialised open_clip image encoder, in eval mode."""
    from open_clip.model import CLIP

    torch.manual_seed(seed)
    text = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 2, "layers": 1}
    return CLIP(embed, vision, text).visual.eval().requires_grad_(False).to(device)
