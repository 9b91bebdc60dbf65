"""sd-mecha: merge methods of ours, registered when this is imported.

    import neulig_fast.compat.sd_mecha      # then sd_mecha.extensions.merge_methods.resolve(name)

==============================  ==================================================================
``nf_weighted_sum(a, b)``       (1 - alpha) a + alpha b
``nf_n_average(*models)``       their mean, in one pass
``nf_add_difference(a, b)``     a + alpha b, b a delta
``nf_ties_sum(*deltas)``        TIES as sd-mecha's ``ties_sum`` means it
``nf_dare_sum(*deltas)``        the mean of deltas of which each element is dropped with a chance
``nf_dare_ties_sum(*deltas)``   and only those of the elected sign
==============================  ==================================================================

Sums are formed in fp32 (fp64 for fp64) and rounded once. Methods keep no state: they may run in
any thread, on its current stream. Draws depend on ``seed``, the key, the delta's number and the
element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sd_mecha
import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from ..ops import blend_lists, merge_task_vectors
from . import _sd_mecha


def _blended(weights: list[float], models: tuple[Tensor, ...]) -> Tensor:
    vector = torch.tensor(weights, dtype=torch.float64, device=models[0].device)
    (merged,) = blend_lists(vector, [[model.resolve_neg().contiguous()] for model in models])
    return merged


def nf_weighted_sum(a: Tensor, b: Tensor, alpha: float = 0.5) -> Tensor:
    return _blended([1 - alpha, alpha], (a, b))


def nf_n_average(*models: Tensor) -> Tensor:
    return _blended([1 / len(models)] * len(models), models)


def nf_add_difference(a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    return _blended([1.0, alpha], (a, b))


def nf_ties_sum(*deltas: Tensor, k: float = 0.2, vote_sgn: bool = False) -> Tensor:
    if not 0 <= k <= 1:
        raise ValueError(f"nf_ties_sum: k must be from 0 to 1, got {k!r}")
    if not deltas[0].numel():
        return deltas[0].to(torch.promote_types(deltas[0].dtype, torch.float32))
    return _sd_mecha.elected_sum(
        [delta.resolve_neg().contiguous() for delta in deltas], k, vote_sgn
    )


def nf_dare_sum(
    *deltas: Tensor, probability: float = 0.9, rescale: bool = True, seed: int = 0, **key: Any
) -> Tensor:
    return _dare(deltas, probability, rescale, seed, key["key"], "none")


def nf_dare_ties_sum(
    *deltas: Tensor, probability: float = 0.9, rescale: bool = True, seed: int = 0, **key: Any
) -> Tensor:
    return _dare(deltas, probability, rescale, seed, key["key"], "sum")


def _dare(
    deltas: tuple[Tensor, ...], probability: float, rescale: bool, seed: int, key: str, elect: str
) -> Tensor:
    """The sum of what is left, divided by the number of deltas that are left, or agree."""
    rows = torch.stack([delta.flatten() for delta in deltas])
    share = rows.new_full((len(rows),), 1 - probability, dtype=torch.float64)
    streams = [xxh3_64_intdigest(f"{key}/{i}".encode()) - 2**63 for i in range(len(rows))]
    merged = merge_task_vectors(
        rows,
        torch.ones_like(share),
        scales=1 / share if rescale and probability < 1 else None,
        density=share,
        seed=seed,
        streams=torch.tensor(streams, device=rows.device),
        elect=elect,
        divide="count",
    )
    return merged.view(deltas[0].shape)


def _register(method: Callable[..., Tensor], space: str | None, **parameters: Any) -> None:
    """``space``: of the result; None is that of the models."""
    annotations = {name: sd_mecha.Parameter(*kind) for name, kind in parameters.items()}
    result = sd_mecha.Return(Tensor, space) if space else sd_mecha.Return(Tensor)
    method.__annotations__ = {**annotations, "return": result}
    sd_mecha.merge_method(method)


_MODEL, _DELTA, _NUMBER = (Tensor,), (Tensor, "delta"), (float,)
_DRAWN = {"deltas": _DELTA, "probability": _NUMBER, "rescale": (bool,), "seed": (int,)}

_register(nf_weighted_sum, None, a=_MODEL, b=_MODEL, alpha=_NUMBER)
_register(nf_n_average, None, models=_MODEL)
_register(nf_add_difference, None, a=_MODEL, b=_DELTA, alpha=_NUMBER)
_register(nf_ties_sum, "delta", deltas=_DELTA, k=_NUMBER, vote_sgn=(bool,))
_register(nf_dare_sum, "delta", **_DRAWN)
_register(nf_dare_ties_sum, "delta", **_DRAWN)
