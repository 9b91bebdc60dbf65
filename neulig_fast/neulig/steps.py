"""Steps of Adam on a Portland: its state, and what a fit computes once of frozen heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..ops.neulig_fit import neulig_fit
from .portland import Portland

if TYPE_CHECKING:
    from .train import FitSettings, TaskData

_ROWS = 1 << 12  # at a time, in the dtype of the sums
# What products may take: times the features' bytes (C = 1000 beside D = 512 in fp16), and bytes. By
# sizes alone, not by what is free: the two ways differ in the last bits, and a fit has one result.
_MOST, _MOST_BYTES = 4, 1 << 32
# Times a row is read, on average, so that products repay themselves: they cost N D C
# multiplications a row, and a use saves 2 D C and a share of many small calls.
_LEAST_USES = 2
# Multiplications per call, so that it ends well within a second and Ctrl-C is heard.
_WORK = 1 << 31
_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamState:
    """A Portland with Adam's moments, in one tensor ``values`` (3, N·N·D + N) that the operator of
    many steps takes. The module's parameters and the moments of ``optimizer`` are views of it."""

    def __init__(self, portland: Portland, lr: float) -> None:
        parameters = (portland.weight, portland.bias)
        self.values = portland.weight.new_zeros(3, sum(p.numel() for p in parameters))
        self.optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
        self.lr, start = lr, 0
        for p in parameters:
            rows = [row.view_as(p) for row in self.values[:, start : start + p.numel()]]
            start += p.numel()
            p.data = rows[0].copy_(p.detach())
            step = torch.zeros((), dtype=torch.float32, device=p.device)
            self.optimizer.state[p] = {"step": step, **dict(zip(_MOMENTS, rows[1:], strict=True))}

    def counters(self) -> list[Tensor]:
        """The number of steps done, one scalar per parameter as Adam keeps it."""
        return [state["step"] for state in self.optimizer.state.values()]


class Products(NamedTuple):
    """Per task what the loss needs of its frozen head: H z (M, N, C), z z' (M, N, N), h (C,)."""

    products: list[Tensor]
    grams: list[Tensor]
    biases: list[Tensor]


def products_of(
    tasks: Sequence[TaskData], dtype: torch.dtype, settings: FitSettings, rounds: int
) -> Products | None:
    """The products of all rows, or None where each step had better use the heads themselves.

    That is where products (few classes are cheap, many are not) would take too much memory beside
    the features, and where the epochs, of so many rounds, read rows too few times to repay them.
    """
    features = [task.features for task in tasks]
    first = features[0]
    alike = all(z.dtype == first.dtype and z.device == first.device for z in features)
    if not alike:
        return None
    size = sum(len(z) * z.shape[1] * (task.head.num_classes + z.shape[1])
               for z, task in zip(features, tasks, strict=True)) * dtype.itemsize  # fmt: skip
    uses = settings.starts * settings.epochs * rounds * settings.batch_size * len(tasks)
    if uses < _LEAST_USES * sum(map(len, features)):
        return None
    if size > min(_MOST * sum(z.nbytes for z in features), _MOST_BYTES):
        return None
    made = Products([], [], [])
    for task in tasks:
        products, grams = _of_task(task, dtype)
        bias = task.head.bias
        made.products.append(products)
        made.grams.append(grams)
        made.biases.append(
            products.new_zeros(products.shape[2]) if bias is None else bias.detach().to(dtype)
        )
    return made


@torch.no_grad()
def _of_task(task: TaskData, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    m, n, _ = task.features.shape
    weight = task.head.weight.to(dtype)
    products = weight.new_empty(m, n, task.head.num_classes)
    grams = weight.new_empty((m, n, n) if task.head.normalize else 0)
    for k in range(0, m, _ROWS):
        z = task.features[k : k + _ROWS].to(dtype)
        torch.matmul(z, weight.T, out=products[k : k + _ROWS])
        if task.head.normalize:
            torch.matmul(z, z.mT, out=grams[k : k + _ROWS])
    return products, grams


def rounds_per_call(tasks: Sequence[TaskData], batch: int) -> int:
    """How many rounds the operator does in one call."""
    row = sum(n * (n * d + task.head.num_classes)
              for task in tasks for n, d in [task.features.shape[1:]])  # fmt: skip
    return max(1, _WORK // (batch * row))


@torch.no_grad()
def run_rounds(
    adam: AdamState, tasks: Sequence[TaskData], cached: Products, rows: list[Tensor],
    matrix: Tensor, centered: bool, settings: FitSettings,
) -> Tensor:  # fmt: skip
    """Rounds on these rows of every task, in one call; returns their loss terms (R, T, 2)."""
    supervised = settings.boosting == "supervised"
    labels = [task.labels for task in tasks if supervised and task.labels is not None]
    counters = adam.counters()
    values, terms = neulig_fit(
        *(adam.values, [task.features for task in tasks], *cached, labels, rows, matrix),
        *(int(counters[0]), settings.batch_size, settings.lr, settings.scaling, centered),
    )
    adam.values.copy_(values)
    for counter in counters:
        counter.add_(terms.shape[0] * terms.shape[1])
    return terms
