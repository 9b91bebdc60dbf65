"""FusionBench: what ``nf.patch("fusion_bench")`` replaces, and classes for its configurations.

    method._target_=neulig_fast.compat.fusion_bench.TiesMerging

The classes take the keys of FusionBench's own, and run these under the patch; ``NeuLigAlgorithm``
and ``MuDSCAlgorithm`` are methods that it does not have. They are made when they are first asked
for, and FusionBench is imported with them.
"""

from __future__ import annotations

import contextlib
import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.specifiers import SpecifierSet

from .._patch import patch
from .._seam import Host, Seam
from . import (
    _copies,
    _experts,
    _masks,
    _merged_models,
    _rank_one,
    _readers,
    _regmean,
    _regmean_statistics,
    _state_dicts,
    _ties,
    _wudi,
)

_PARTS = (
    _merged_models, _ties, _copies, _experts, _state_dicts, _regmean, _regmean_statistics, _wudi,
    _masks, _rank_one, _readers,
)  # fmt: skip
_PATCHED = {
    "TiesMerging": "ties_merging.ties_merging:TiesMergingAlgorithm",
    "SimpleAverage": "simple_average:SimpleAverageAlgorithm",
    "DareTaskArithmetic": "dare.task_arithmetic:DareTaskArithmetic",
    "DareTiesMerging": "dare.ties_merging:DareTiesMerging",
    "EMRMerging": "emr_merging.emr_merging:EMRMerging",
    "WUDIMerging": "wudi.wudi:WUDIMerging",
    "CLIPLayerWiseAdaMerging": (
        "adamerging.clip_layer_wise_adamerging:CLIPLayerWiseAdaMergingAlgorithm"
    ),
    "CLIPTaskWiseAdaMerging": (
        "adamerging.clip_task_wise_adamerging:CLIPTaskWiseAdaMergingAlgorithm"
    ),
    "CLIPWeightEnsemblingMoE": "we_moe.clip_we_moe:CLIPWeightEnsemblingMoEAlgorithm",
}
_OWN = ("NeuLigAlgorithm", "MuDSCAlgorithm")

__all__ = ["HOST", *_PATCHED, *_OWN]


def _seams() -> list[Seam]:
    return [seam for part in _PARTS for seam in part.seams()]


HOST = Host("fusion_bench", "fusion_bench", SpecifierSet("==0.2.33"), _seams)


class _Patched:
    """A method of FusionBench that runs under the patch."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """As the original's."""
        active = any(handle.name == HOST.name for handle in patch.status())
        with contextlib.nullcontext() if active else patch(HOST.name):
            return super().run(*args, **kwargs)  # type: ignore[misc]


def __getattr__(name: str) -> Any:
    if name not in _PATCHED and name not in _OWN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        version(HOST.distribution)
    except PackageNotFoundError:
        text = f"{__name__}.{name} needs FusionBench: pip install {HOST.distribution}"
        raise ImportError(text) from None
    if name in _OWN:
        found = getattr(importlib.import_module("._algorithms", __name__), name)
    else:
        module, original = _PATCHED[name].split(":")
        theirs = getattr(importlib.import_module(f"fusion_bench.method.{module}"), original)
        text = f"FusionBench's {original} under ``nf.patch``, with the same keys."
        found = type(name, (_Patched, theirs), {"__module__": __name__, "__doc__": text})
    globals()[name] = found
    return found
