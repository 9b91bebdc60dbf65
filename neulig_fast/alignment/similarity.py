"""Likeness of units: Pearson correlation, or the raw inner product, from streamed moments.

MuDSC (arXiv 2403.01753) correlates rows of weights in one space and activations in the other. Both
are sums: over tensors in the one case, over batches in the other. So each share is kept as its
cross products, sums and squares, and the correlation is formed once they are added up.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["correlation", "inner_product"]
KINDS = ("correlation", "inner_product")
Pair = tuple[int, int]  # networks, the first of which lies in the rows of the similarity

_SMALLEST = 1e-7  # of a product of two standard deviations: what hardly varies is like nothing


class Rows(NamedTuple):
    """Sums and squares of n units over their samples: (n,) fp64 each."""

    sums: Tensor
    squares: Tensor

    def __add__(self, other: Rows) -> Rows:  # type: ignore[override]
        return Rows(self.sums + other.sums, self.squares + other.squares)


def correlation(cross: Tensor, x: Rows, y: Rows, count: int) -> Tensor:
    """(X, Y): Pearson correlation of units from sums over ``count`` samples of shifted values.

    Correlation does not see a shift, which only keeps digits: without one, units whose mean is far
    from zero would lose their variance to rounding. A unit that does not vary has correlation 0.

    Args:
        cross: (X, Y), the sum of products.
        x, y: sums and squares of the same values.
    """
    means = [rows.sums / count for rows in (x, y)]
    deviations = [
        (rows.squares / count - mean.square()).clamp_min(0).sqrt().to(cross.dtype)
        for rows, mean in zip((x, y), means, strict=True)
    ]
    covariance = cross / count
    covariance.addr_(means[0].to(cross.dtype), means[1].to(cross.dtype), alpha=-1)
    return covariance.div_(torch.outer(*deviations).clamp_min_(_SMALLEST))
