"""mergekit's methods of task vectors: task arithmetic, TIES, DARE, Model Breadcrumbs.

Each is one of our methods for a whole tensor, but for DARE, whose draws are made once for what they
are needed for twice. In fp32 that is also ``exact`` where mergekit's own result is determined: the
same steps, each rounded to fp32. DELLA, and 16-bit tensors for ``exact``, are merged by mergekit,
with ``mergekit.sparsify:sparsify`` replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...methods import METHODS, Task
from .._seam import Unsupported
from .._tensors import check_alike, check_finite, check_ranked
from . import _sparsify
from ._dare import dare
from ._rows import merged, word

# How signs are elected and what drops elements, in mergekit's words, and our name of both.
_METHODS = {
    (None, None): "task_arithmetic",
    ("sum", "magnitude"): "ties",
    ("sum", "random"): "dare_ties",
    (None, "random"): "dare_linear",
    (None, "magnitude_outliers"): "breadcrumbs",
    ("sum", "magnitude_outliers"): "breadcrumbs_ties",
}
_IN_ORDER = 4  # sums of so many terms torch forms from the first to the last
_FAR = 1e37  # from the largest finite number


def merge_group(self: Any, group: Any, /, **parameters: Any) -> Tensor:
    """``GeneralizedTaskArithmeticMerge.merge_group``."""
    experts = group.non_base
    if not experts:
        raise Unsupported("no experts")
    name = _METHODS.get((word(self.consensus_method), word(self.sparsification_method)))
    if name is None:
        raise Unsupported("DELLA, or what is none of mergekit's methods")
    settings = {
        key: value.values_for(experts) if hasattr(value, "values_for") else value
        for key, value in parameters.items()
    }
    tensors = [*(entry.tensor for entry in experts), group.base.tensor]
    return _merged(name, settings, tensors)


def merge_group_exact(self: Any, group: Any, /, **parameters: Any) -> Tensor:
    """The same, where each step of mergekit's is one of ours."""
    if word(self.sparsification_method) == "random":
        raise Unsupported("draws of torch")
    if parameters["rescale"] and self.sparsification_method is not None:
        raise Unsupported("rescaling, by sums in torch's order")
    if len(group.non_base) > _IN_ORDER:
        raise Unsupported(f"more than {_IN_ORDER} experts, added up in torch's order")
    check_alike(group.tensors, strided=True)
    if group.base.tensor.dtype != torch.float32:
        raise Unsupported("no fp32, so that mergekit rounds every step")
    check_finite(*group.tensors, below=_FAR)
    return merge_group(self, group, **parameters)


def sparsify(
    tensor: Tensor,
    density: float,
    method: Any,
    gamma: float = 0,
    epsilon: float = 0,
    rescale_norm: Any = None,
) -> Tensor:
    """``mergekit.sparsify:sparsify``: the only task vector of a merge, on a base of zeros."""
    norm = word(rescale_norm)
    names = [name for (_, dropping), name in _METHODS.items() if dropping == word(method)]
    if not names:
        return _sparsify.sparsify(tensor, density, method, gamma, epsilon, rescale_norm)
    if norm not in (None, "l1"):
        raise Unsupported("another norm than l1")
    each = {"weight": [1.0], "density": [density], "gamma": [gamma]}
    shared = {"lambda": 1.0, "normalize": False, "rescale": norm is not None}
    return _merged(names[0], {**each, **shared}, [tensor, torch.zeros_like(tensor)])


def _merged(name: str, settings: Mapping[str, Any], tensors: list[Tensor]) -> Tensor:
    """The result of one of our methods; Unsupported for settings that it lacks."""
    check_alike(tensors, strided=True)
    method, elements = METHODS[name], tensors[0].numel()
    known = method.parameters
    # What other frameworks have besides stays as it is.
    settings = {key: settings.get(key, parameter.default) for key, parameter in known.items()}
    if "density" in settings:
        settings["density"] = [min(density, 1.0) for density in settings["density"]]
    for key, parameter in known.items():
        for value in settings[key] if parameter.each else [settings[key]]:
            if any(parameter.faults(value)):
                raise Unsupported(f"settings out of bounds: {key}")
    if name.startswith("dare"):
        return dare(settings, tensors, elected=name == "dare_ties")
    if name == "ties":
        settings["density"] = [_at_least_one(d, elements) for d in settings["density"]]
    result = merged(method, Task("", (elements,), len(tensors) - 1, True, settings), tensors)
    if "density" in settings:
        check_ranked(result)
    return result


def _at_least_one(density: float, elements: int) -> float:
    """Where ``density`` is not 0, the share of at least one element, which mergekit keeps."""
    if density == 0 or int(density * elements) > 0:
        return density
    return min(1.5 / elements, 1.0)
