"""RegMean (arXiv 2212.09849): linear layers that agree best with the experts' on their inputs.

    (sum_i G_i) W = sum_i G_i W_i          G_i = X_i^T X_i / rows, its off-diagonal shrunk by r

The original inverts the sum. Here it is a Cholesky factor, and the offset from the first model that
is solved for, so that one product less is made and no more than offsets are rounded:

    W = W_1 + (sum_i G_i)^-1 sum_{i>1} G_i (W_i - W_1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...ops.blend_lists import blend_lists
from .._seam import Seam, Unsupported
from .._tensors import check_one_form, check_plain
from ._tensors import as_lists

_METHOD = "fusion_bench.method"
_MODULES = ("regmean.regmean", "regmean_plusplus.regmean_plusplus")


def seams() -> list[Seam]:
    """Of RegMean and RegMean++: the shrinking and the merge."""
    found = []
    for module in _MODULES:
        where = f"{_METHOD}.{module}"
        found.append(Seam(f"{where}:reduce_non_diagonal_elements", shrunk, shrunk))
        found.append(Seam(f"{where}:merging_with_regmean_weights", None, merged))
    return found


def shrunk(regmean_weights: Tensor, reduce_non_diagonal_ratio: float) -> Tensor:
    """G with all but its diagonal times the ratio, at once. Two factors, rounded as the
    original's matrices of them, to torch's default type."""
    check_plain(regmean_weights)
    if regmean_weights.ndim != 2 or regmean_weights.shape[0] != regmean_weights.shape[1]:
        raise Unsupported("statistics that are no square matrix")
    if not isinstance(reduce_non_diagonal_ratio, (int, float)):
        raise Unsupported("a ratio that is no number")
    off = torch.ones(1).fill_(reduce_non_diagonal_ratio)
    own = torch.ones(1) - reduce_non_diagonal_ratio + off
    kind = torch.promote_types(regmean_weights.dtype, off.dtype)
    result = regmean_weights.to(kind) * off.to(regmean_weights.device)
    torch.mul(regmean_weights.diagonal(), own.to(result.device), out=result.diagonal())
    return result


def merged(
    models_to_merge_param_dict: Mapping[str, Sequence[Tensor]],
    models_to_merge_regmean_weights_list: Sequence[Mapping[str, Tensor]],
    reduce_non_diagonal_ratio: float = 1.0,
    weight_transpose: bool = True,
) -> dict[str, Tensor]:
    """The merged parameters: of layers with statistics as above, the mean of others."""
    statistics = models_to_merge_regmean_weights_list
    result: dict[str, Tensor] = dict.fromkeys(models_to_merge_param_dict)
    averaged = []
    for name, tensors in models_to_merge_param_dict.items():
        check_plain(*tensors)
        check_one_form(tensors)
        module = name.removesuffix(".weight")
        if module == name or module not in statistics[0]:
            averaged.append(name)
            continue
        grams = [each.get(module) for each in statistics]
        if len(grams) != len(tensors) or {(g.dtype, g.device) for g in _all(grams)} != {
            (tensors[0].dtype, tensors[0].device)
        }:
            raise Unsupported("statistics that do not fit the models")
        weights = [w.T if weight_transpose else w for w in tensors]
        found = _solved([shrunk(g, reduce_non_diagonal_ratio) for g in _all(grams)], weights)
        result[name] = found.T if weight_transpose else found
    if averaged:
        models = [*zip(*(models_to_merge_param_dict[name] for name in averaged), strict=True)]
        lists = as_lists(models)
        shares = torch.full((len(models),), 1 / len(models), dtype=torch.float64)
        means = blend_lists(shares.to(lists.device), lists)
        result.update(zip(averaged, means, strict=True))
    return result


def _all(grams: Sequence[Tensor | None]) -> list[Tensor]:
    found = [gram for gram in grams if gram is not None]
    if len(found) < len(grams):
        raise Unsupported("a model without statistics of a layer")
    return found


def _solved(grams: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """(I, O) of N matrices (I, I) and N (I, O)."""
    if any(g.shape[1:] != w.shape[:1] for g, w in zip(grams, weights, strict=True)):
        raise Unsupported("statistics that do not fit the models")
    if grams[0].dtype.itemsize < 4 or weights[0].dtype.itemsize < 4:
        raise Unsupported("16-bit tensors, which the original does not multiply")
    total, target = grams[0].clone(), torch.zeros_like(weights[0])
    for gram, weight in zip(grams[1:], weights[1:], strict=True):
        total += gram
        target.addmm_(gram, weight - weights[0])
    factor, info = torch.linalg.cholesky_ex(total)
    if int(info) or not factor.isfinite().all():
        raise Unsupported("statistics that are not positive definite")
    return torch.cholesky_solve(target, factor).add_(weights[0])
