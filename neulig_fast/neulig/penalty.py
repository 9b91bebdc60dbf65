"""The alignment term's matrix A, from the experts' own offsets.

L_a = (1/(λB)) Σ_b v_b' A v_b with v_b = w_b, or w_b - mean_b w_b when centered:

===========  =============  ========  =====  ====================================================
form         A              centered  λ      holds small
===========  =============  ========  =====  ====================================================
offset_sum   s s'           no        100    the published term: z-scored scalar sums of offsets
gram         Ĝ              no        100    ‖Σ w_i ξ_i‖², the constraint in full: towards θ̄
variance     ½ D̂            no        10     the second-order gap of merging each sample's own w_b
dispersion   Ĝ              yes       100    the first-order gap of merging the batch's mean w
none         0              no        1      nothing
===========  =============  ========  =====  ====================================================

Ĝ = G (N-1)/tr G; D̂ = D divided by its mean off-diagonal, D_ij = ‖θ_i - θ_j‖². Where the experts
do not differ (N = 1, or identical ones) and, for ``offset_sum``, where their sums do not, A is
zero. With N = 2, s = ±1/√2 whatever the experts are. NeuLig (arXiv 2503.01268);
docs/neulig.md, 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..offsets import OffsetStats

SCALINGS = {"offset_sum": 100.0, "gram": 100.0, "variance": 10.0, "dispersion": 100.0, "none": 1.0}
ALIGNMENTS = tuple(SCALINGS)


class Penalty(NamedTuple):
    """``matrix`` A (N, N) fp64 on the CPU, ``centered``, and the form's default ``scaling`` λ."""

    matrix: Tensor
    centered: bool
    scaling: float


def alignment_penalty(alignment: str, stats: OffsetStats) -> Penalty:
    """The table's row for these experts.

    Raises:
        ValueError: an unknown form.
    """
    if alignment not in ALIGNMENTS:
        raise ValueError(f"alignment must be one of {', '.join(ALIGNMENTS)}, got {alignment!r}")
    whole = stats.total()
    if alignment == "offset_sum":
        matrix = torch.outer(whole.zscores, whole.zscores)
    elif alignment == "variance":
        matrix = whole.variance_matrix()
    elif alignment == "none":
        matrix = torch.zeros_like(whole.gram)
    else:
        matrix = whole.gram_normalized()
    return Penalty(matrix, alignment == "dispersion", SCALINGS[alignment])
