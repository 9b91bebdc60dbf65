"""Convolutions as linear layers of the windows that they look at."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """How the kernel moves, in the order of ``torch.nn.functional.conv2d``'s arguments."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def overlap(self, kernel: torch.Size) -> bool:
        """Whether windows share pixels, or see padding: else they are no larger than the image."""
        steps = zip(kernel, self.stride, strict=True)
        return any(self.padding) or any(size > step for size, step in steps)

    def fits(self, image: torch.Size, kernel: Pair) -> bool:
        """Whether there is a window at all."""
        sides = zip(image, kernel, self.padding, self.dilation, strict=True)
        return all(pixels + 2 * pad > apart * (size - 1) for pixels, size, pad, apart in sides)

    def positions(self, image: torch.Size, kernel: torch.Size) -> int:
        """How many windows there are."""
        count = 1
        for pixels, size, step, pad, apart in zip(
            image, kernel, self.stride, self.padding, self.dilation, strict=True
        ):
            count *= (pixels + 2 * pad - apart * (size - 1) - 1) // step + 1
        return count


def windows(x: Tensor, kernel: torch.Size, g: Geometry) -> Tensor:
    """(R, H', W', I * kh * kw): the pixels under the kernel at every position of x (R, I, H, W).

    A view where x is stored channels last and the kernel is a single pixel.
    """
    if any(g.padding):
        high, wide = g.padding
        x = F.pad(x, (wide, wide, high, high))
    for dim, size, step, apart in zip((2, 3), kernel, g.stride, g.dilation, strict=True):
        x = x.unfold(dim, apart * (size - 1) + 1, step)[..., ::apart]
    return x.permute(0, 2, 3, 1, 4, 5).flatten(3)
