"""mergekit's selections and merges, and FusionBench's masks, on any tensors at all.

As in :mod:`test_compat_fuzz_merges`: ``exact`` to the bit, ``accurate`` no further from fp64.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from .test_compat_fuzz import ORDINARY, VECTORS, ordinary, stacks, taken
from .test_compat_fuzz_merges import (
    BROKEN,
    DENSITIES,
    NUMBERS,
    VIEWS,
    compared,
    distinct,
    needs,
    often,
    seen,
)  # fmt: skip

EMR = "fusion_bench.method.emr_merging.utils:emr_merge"
TALL = "fusion_bench.method.tall_mask.utils:generate_task_masks"
SPARSIFY = "mergekit.sparsify:sparsify"

# -- mergekit --------------------------------------------------------------------------------------

DROPPING = st.sampled_from(["magnitude", "magnitude_outliers", "della_magprune"])
GAMMAS = st.sampled_from([0.0, 0.01, 0.3, 1.0, -0.5])
TINY = torch.tensor([[1e-20, -2e-20, 3e-20, -4e-20]])


def sparsified(method: str, gamma: float, rescale: bool) -> dict[str, Any]:
    module = importlib.import_module("mergekit.sparsify")
    norm = module.RescaleNorm.l1 if rescale else None
    more = {"gamma": gamma, "epsilon": gamma / 10, "rescale_norm": norm}
    return {"method": module.SparsificationMethod(method), **more}


@often
@given(distinct(), DENSITIES, DROPPING, GAMMAS, st.booleans(), VIEWS)
@example(ORDINARY, 0.5, "magnitude", 0.0, True, "plain")
@example(ORDINARY, 0.5, "magnitude_outliers", 0.3, False, "plain")
@example(ORDINARY, 0.5, "della_magprune", 1.0, True, "plain")
@needs("mergekit")
def test_sparsify_to_the_bit(
    rows: Tensor, density: float, method: str, gamma: float, rescale: bool, view: str
) -> None:
    how, tensor = sparsified(method, gamma, rescale), seen(rows[0], view)
    left = not ordinary(rows) or view != "plain" or not density > 0 or gamma < 0
    left |= method == "della_magprune" and not 0 < density - gamma / 10 < density + gamma / 10 < 1
    left |= tensor.ndim not in (1, 2) or tensor.shape[-1] < 2
    assert taken("mergekit", SPARSIFY, tensor, density, **how) or left


@often
@given(distinct(), DENSITIES, DROPPING, GAMMAS, st.booleans(), VIEWS)
@example(BROKEN, 0.5, "magnitude", 0.0, False, "plain")
@example(TINY, 0.5, "magnitude_outliers", 0.3, True, "plain")
@example(TINY * 1e13, 0.25, "magnitude", 0.0, True, "plain")
@needs("mergekit")
def test_sparsify_is_no_further_from_the_truth(
    rows: Tensor, density: float, method: str, gamma: float, rescale: bool, view: str
) -> None:
    if method == "della_magprune":
        return  # as ``exact``
    how, tensor = sparsified(method, gamma, rescale), seen(rows[0], view)
    how |= {"terms": max(1, tensor.numel()), "infinite": bool(tensor.isinf().any())}
    left = not ordinary(rows) or view not in ("plain", "transposed") or density < 0 or gamma < 0
    assert compared("mergekit", SPARSIFY, tensor, density, **how) or left


@often
@given(distinct(), NUMBERS, DENSITIES, GAMMAS, st.booleans(), st.booleans(), st.booleans())
@example(ORDINARY, [1, 0.5, -1.5, 0, 0], 0.5, 0.3, True, True, False)
@example(BROKEN, [1, 0.5, -1.5, 0, 0], 0.5, 0.0, False, True, False)
@example(BROKEN, [1, 0.5, -1.5, 0, 0], 1e-9, 0.0, False, True, False)
@example(torch.cat([TINY, -TINY]), [1, 0.5, 0, 0, 0], 0.5, 0.3, True, False, True)
@needs("mergekit")
def test_merges_of_mergekit(
    rows: Tensor, numbers: list[float], density: float, gamma: float, elected: bool,
    normalize: bool, rescale: bool,
) -> None:  # fmt: skip
    """On a base of zeros, whose task vectors are the rows; both parities."""
    methods = importlib.import_module("mergekit.merge_methods")
    where = "mergekit.merge_methods.generalized_task_arithmetic"
    where += ":GeneralizedTaskArithmeticMerge.merge_group"
    group = methods.TensorGroup.from_tensors([torch.zeros_like(rows[0]), *rows], base_index=0)

    def each(values: list[float]) -> Any:
        ids = [entry.id for entry in group.non_base]
        return methods.PerInputValues([*zip(ids, values, strict=True)])

    parameters = {
        "weight": each(numbers[: len(rows)]), "density": each([density] * len(rows)),
        "gamma": each([gamma] * len(rows)), "normalize": normalize, "rescale": rescale,
        "lambda": 1.0, "int8_mask": False,
    }  # fmt: skip
    for name in ("ties", "breadcrumbs_ties" if elected else "breadcrumbs"):
        method = methods.get(name)
        known = {k: v for k, v in parameters.items() if k != "gamma" or name != "ties"}
        left = not ordinary(rows) or density < 0 or (name != "ties" and gamma < 0)
        assert taken("mergekit", where, method, group, **known) or left or rescale
        known |= {"terms": rows.numel() + 1, "infinite": bool(rows.isinf().any())}
        assert compared("mergekit", where, method, group, **known) or left


@often
@given(stacks(), st.sampled_from(["sum", "count", "loudest"]), st.booleans())
@example(ORDINARY, "count", True)
@needs("mergekit")
def test_signs_of_mergekit(rows: Tensor, method: str, small: bool) -> None:
    where = "mergekit.merge_methods.generalized_task_arithmetic:get_mask"
    kind = torch.int8 if small else None
    left = not ordinary(rows) or method == "loudest" or rows.ndim < 2
    assert taken("mergekit", where, rows, method, kind) or left


# -- FusionBench's masks ---------------------------------------------------------------------------


@often
@given(stacks() | distinct(), VIEWS)
@example(ORDINARY, "plain")
@needs("fusion_bench")
def test_emr(rows: Tensor, view: str) -> None:
    vectors = [{"a": seen(row, view), "b": row} for row in rows]
    left = not ordinary(rows) or view != "plain"
    assert taken("fusion_bench", EMR, vectors) or left


@often
@given(stacks(VECTORS) | distinct(VECTORS), st.sampled_from([0.0, 0.4, 1.0, -1.0]), st.booleans())
@example(ORDINARY, 0.4, True)
@needs("fusion_bench")
def test_tall(rows: Tensor, share: float, known: bool) -> None:
    base = rows.flip(0)[0]
    merged = rows.sum(0).to(rows.dtype) if known else None
    left = not ordinary(rows) or not known
    assert taken("fusion_bench", TALL, rows, base + rows, base, merged, share) or left
