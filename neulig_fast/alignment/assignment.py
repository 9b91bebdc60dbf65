"""One-to-one matching: the order of one network's units that is most like another's.

A similarity (n, n) has the units of network 1, the reference, as rows and those of network i as
columns. The order that maximises sum_k C[k, order[k]] puts unit ``order[k]`` of network i beside
unit k of network 1: a maximum-weight assignment. MuDSC (arXiv 2403.01753), Git Re-Basin
(arXiv 2209.04836).
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .. import _checks


def assign(similarity: Tensor) -> tuple[Tensor, float]:
    """The order of most similarity, and the mean similarity of its pairs.

    Args:
        similarity: (n, n), any float dtype, finite; computed in fp64.

    Returns:
        ``(order, value)``: (n,) int64 on the CPU, and the mean of ``similarity[k, order[k]]``.
        Of several best orders the same matrix always gives the same one.

    Raises:
        TypeError: no tensor.
        ValueError: another shape or dtype, NaN or infinity.
    """
    _checks.check_tensors("assign", similarity=similarity)
    _checks.raise_all("assign", similarity_faults("similarity", similarity))
    matrices = in_float64(similarity).unsqueeze(0)
    order = torch.from_numpy(_solve(matrices.numpy()))
    return order[0], float(_means(matrices, order)[0])


def assign_many(similarities: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`assign` for every matrix of a batch, on as many threads as torch uses.

    Args:
        similarities: (m, n, n), any float dtype, finite; computed in fp64.

    Returns:
        ``(orders, values)``: (m, n) int64 and (m,) fp64, on the CPU; no number of threads changes
        them.

    Raises:
        TypeError: no tensor.
        ValueError: another shape or dtype, NaN or infinity.
    """
    _checks.check_tensors("assign_many", similarities=similarities)
    faults = similarity_faults("similarities", similarities, batch="m, ")
    _checks.raise_all("assign_many", faults)
    matrices = in_float64(similarities)
    # scipy's solver releases the interpreter lock, so that threads help.
    threads = max(1, min(torch.get_num_threads(), len(matrices)))
    with ThreadPoolExecutor(threads) as pool:
        shares = list(pool.map(_solve, np.array_split(matrices.numpy(), threads)))
    orders = torch.from_numpy(np.concatenate(shares))
    return orders, _means(matrices, orders)


def similarity_faults(
    name: str, similarity: Tensor, size: int | None = None, batch: str = ""
) -> list[str]:
    """Why a tensor is no similarity of ``size`` units, or of any number of them."""
    side = "n" if size is None else str(size)
    ndim = 3 if batch else 2
    rows, columns = similarity.shape[-2:] if similarity.ndim == ndim else (0, 0)
    found = _checks.layout_faults(name, similarity)
    if rows < 1 or rows != columns or (size is not None and rows != size):
        expected = f"({batch}{side}, {side})" + (" with n >= 1" if size is None else "")
        found.append(f"{name} must be {expected}, got {_checks.shape(similarity)}")
    if similarity.dtype not in _checks.FLOAT_DTYPES:
        found.append(f"{name} must be fp32, bf16, fp16 or fp64, got {similarity.dtype}")
    if found:
        return found
    broken = ~similarity.isfinite()
    if broken.any():
        where = tuple(broken.nonzero()[0].tolist())
        found.append(
            f"{name} has {int(broken.sum())} NaN or infinite entries, the first at {where}"
        )
    return found


def in_float64(similarity: Tensor) -> Tensor:
    """A similarity as everything here computes with it: fp64 on the CPU, without gradient."""
    return similarity.detach().to("cpu", torch.float64)


def _solve(matrices: np.ndarray) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment  # not before it is needed: it loads slowly

    orders = np.empty(matrices.shape[:2], dtype=np.int64)
    for order, matrix in zip(orders, matrices, strict=True):
        order[:] = linear_sum_assignment(matrix, maximize=True)[1]
    return orders


def _means(matrices: Tensor, orders: Tensor) -> Tensor:
    return matrices.gather(-1, orders.unsqueeze(-1)).squeeze(-1).mean(-1)
