"""Copies of TIES's utilities in other modules of FusionBench, which are the same functions again.

Not these, which are others: those of ``doge_ta`` are methods, and keep a mask alone; that of
``models.open_clip`` takes 1 for a percent; ``utils.parameters`` copies nothing as it is.
"""

from __future__ import annotations

from .._seam import Seam
from . import _ties

_VECTORS = ("state_dict_to_vector", "vector_to_state_dict")
_COPIES = {
    "fusion_bench.method.fw_merging.utils": (*_VECTORS, "topk_values_mask", "ties_merging"),
    "fusion_bench.method.gossip.utils": _VECTORS,
    "fusion_bench.method.trust_region.utils": _VECTORS,
    "fusion_bench.models.open_clip.utils": _VECTORS,
}


def seams() -> list[Seam]:
    """Each with what replaces TIES's own."""
    own = {seam.where.split(":")[1]: seam for seam in _ties.seams()}
    return [
        own[name]._replace(where=f"{module}:{name}")
        for module, names in _COPIES.items()
        for name in names
    ]
