"""mergekit: what ``nf.patch("mergekit")`` replaces, and the methods that it adds."""

from __future__ import annotations

import importlib

from packaging.specifiers import SpecifierSet

from .._seam import Host, Seam
from . import _elements, _means, _mudsc, _named, _neulig, _sparsify, _task_vectors

_METHODS = "mergekit.merge_methods"


def _seams() -> list[Seam]:
    arithmetic = f"{_METHODS}.generalized_task_arithmetic"
    mask = _elements.in_columns(importlib.import_module(arithmetic).get_mask)
    neulig, mudsc = _neulig.method(), _mudsc.method()
    named = [_named.method(name) for name in ("ties", "dare_ties")]
    ram = importlib.import_module(f"{_METHODS}.ram").ram_merge.implementation
    nearswap = importlib.import_module(f"{_METHODS}.nearswap").nearswap_merge.implementation
    return [
        Seam(f"{arithmetic}:GeneralizedTaskArithmeticMerge.merge_group",
             _task_vectors.merge_group_exact, _task_vectors.merge_group),
        Seam(f"{arithmetic}:get_mask", mask, mask),
        Seam("mergekit.sparsify:sparsify", _sparsify.sparsify, _task_vectors.sparsify),
        Seam(f"{_METHODS}.linear:linear_merge.implementation", None, _elements.linear),
        Seam(f"{_METHODS}.slerp:slerp", None, _means.slerp),
        Seam(f"{_METHODS}.nuslerp:nuslerp_merge_method.implementation", None, _means.nuslerp),
        Seam(f"{_METHODS}.multislerp:multislerp.implementation", None, _means.multislerp),
        Seam(f"{_METHODS}.karcher:karcher_merge_tensors", None, _means.karcher_merge_tensors),
        Seam(f"{_METHODS}.model_stock:model_stock_merge_method.implementation", None,
             _means.model_stock),
        Seam(f"{_METHODS}.sce:sce_merge.implementation", None, _elements.sce),
        Seam(f"{_METHODS}.ram:ram_merge.implementation", _elements.in_blocks(ram), _elements.ram),
        Seam(f"{_METHODS}.nearswap:nearswap_merge.implementation",
             _elements.in_blocks(nearswap), _elements.in_blocks(nearswap, wide=True)),
        Seam(f"{_METHODS}.registry:_METHODS[neulig]", neulig, neulig),
        Seam(f"{_METHODS}.registry:_METHODS[mudsc]", mudsc, mudsc),
        *(Seam(f"{_METHODS}.registry:_METHODS[{m.method_name}]", m, m) for m in named),
    ]  # fmt: skip


HOST = Host("mergekit", "mergekit", SpecifierSet("==0.1.5"), _seams)
