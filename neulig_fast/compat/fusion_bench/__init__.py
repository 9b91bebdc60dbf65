"""FusionBench: what ``nf.patch("fusion_bench")`` replaces, and classes for its configurations."""

from __future__ import annotations

from packaging.specifiers import SpecifierSet

from .._seam import Host, Seam
from . import _experts, _masks, _merged_models, _state_dicts, _ties, _wudi

_PARTS = (_merged_models, _ties, _experts, _state_dicts, _wudi, _masks)


def _seams() -> list[Seam]:
    return [seam for part in _PARTS for seam in part.seams()]


HOST = Host("fusion_bench", "fusion_bench", SpecifierSet("==0.2.33"), _seams)
