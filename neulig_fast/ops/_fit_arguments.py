"""What has to hold of the arguments of ``neulig_fit``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import FLOAT_DTYPES, accumulation_dtype, shape

_MAX_EXPERTS = 64  # of the kernels


def rounds(rows: Sequence[Tensor], batch: int) -> int:
    """R, the number of batches of every task."""
    return -(-rows[0].numel() // batch)


def faults(state, features, products, grams, biases, labels, rows, alignment,
           step, batch, lr, scaling, centered) -> Iterator[str]:  # fmt: skip
    """What is wrong with the form of the arguments."""
    T = len(features)
    lists = {"products": products, "grams": grams, "biases": biases, "labels": labels, "rows": rows}
    for name, tensors in lists.items():
        if len(tensors) != T and (name, len(tensors)) != ("labels", 0):
            yield f"{name} must have one tensor per task, {T}, got {len(tensors)}"
            return
    if T == 0 or features[0].ndim != 3 or 0 in features[0].shape[1:]:
        got = shape(features[0]) if T else "no tensor"
        yield f"features must be (M, N, D) for at least one task, got {got}"
        return
    if features[0].dtype not in FLOAT_DTYPES:
        yield f"features must be float tensors, got {features[0].dtype}"
        return
    device = features[0].device
    for name, tensor, wanted, dtype in _expected(state, features, lists, alignment):
        if tensor.shape != wanted or tensor.dtype != dtype or tensor.device != device:
            yield (
                f"{name} must be {shape(wanted)} {dtype} on {device}, "
                f"got {shape(tensor)} {tensor.dtype} on {tensor.device}"
            )
    if any(p.ndim == 3 and 0 in p.shape[1:] for p in products):
        yield "products must be of at least one class"
    if step < 0:
        yield f"step must not be negative, got {step}"
    if not scaling > 0:
        yield f"scaling must be positive, got {scaling}"
    if batch < 1:
        yield f"batch must be positive, got {batch}"
    elif any(rounds([row], batch) != rounds(rows, batch) for row in rows):
        got = ", ".join(str(row.numel()) for row in rows)
        yield f"rows must make as many batches of {batch} in every task, got {got} rows"


def _expected(
    state: Tensor, features: Sequence[Tensor], lists: dict[str, Sequence[Tensor]], alignment: Tensor
) -> Iterator[tuple[str, Tensor, tuple[int, ...], torch.dtype]]:
    """Every tensor's name, and the shape and dtype it must have."""
    (_, N, D), dtype = features[0].shape, features[0].dtype
    acc = accumulation_dtype(dtype)
    yield "state", state, (3, N * N * D + N), acc
    yield "alignment", alignment, (N, N), acc
    for t, z in enumerate(features):
        M = z.shape[0]
        own = {name: tensors[t] for name, tensors in lists.items() if tensors}
        C = own["products"].shape[-1] if own["products"].ndim else 1
        gram = own["grams"]
        yield f"features[{t}]", z, (M, N, D), dtype
        yield f"products[{t}]", own["products"], (M, N, C), acc
        yield f"grams[{t}]", gram, (M, N, N) if gram.numel() else tuple(gram.shape), acc
        yield f"biases[{t}]", own["biases"], (C,), acc
        yield f"rows[{t}]", own["rows"], (own["rows"].numel(),), torch.int64
        if "labels" in own:
            yield f"labels[{t}]", own["labels"], (M,), torch.int64


def check_values(state, features, products, grams, biases, labels, rows, *_: Any) -> None:
    """Rows and labels that would be read out of bounds."""
    for t, chosen in enumerate(rows):
        limits = [("rows", chosen, features[t].shape[0])]
        if labels:
            limits.append(("labels", labels[t], products[t].shape[2]))
        for name, numbers, end in limits:
            if numbers.numel() == 0:
                continue
            low, high = torch.aminmax(numbers)
            if low < 0 or high >= end:
                wrong = numbers[(numbers < 0) | (numbers >= end)].unique().tolist()
                raise ValueError(f"neulig_fit: {name}[{t}] must be in [0, {end}), got {wrong[:8]}")


def why_not(state, features, products, grams, biases, labels, rows, alignment, *_: Any):
    """Why no kernel can take this call, or None."""
    named = {
        "state": [state], "features": features, "products": products, "grams": grams,
        "biases": biases, "labels": labels, "rows": rows, "alignment": [alignment],
    }  # fmt: skip
    for name, tensors in named.items():
        if not all(tensor.is_contiguous() for tensor in tensors):
            return f"{name} must be contiguous"
    N = alignment.shape[0]
    return None if N <= _MAX_EXPERTS else f"N={N} > {_MAX_EXPERTS} experts"
