"""Counts that one pass over one task leaves behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor


class TaskTally:
    """Correct answers, agreement with the ensemble and CoopVec sums of one task.

    Args:
        num_experts: N.
        own: index of the task's own expert, or None when it has none.
    """

    def __init__(self, num_experts: int, own: int | None = None) -> None:
        self.own = own
        self.samples = self.batch_size = self.own_is_argmax = 0
        self.correct: Counter[str] = Counter()
        self.agreeing: Counter[str] = Counter()
        self.coopvec_sum = torch.zeros(num_experts, dtype=torch.float64)
        self.max_sum = self.entropy_sum = 0.0

    def add(self, predictions: Mapping[str, Tensor], labels: Tensor, coopvec: Tensor) -> None:
        """One batch: row -> predicted classes (B,), one row being ``ensemble``; CoopVecs (B, N)."""
        w = coopvec.to(torch.float64)
        self.samples += len(labels)
        self.batch_size = max(self.batch_size, len(labels))
        for row, predicted in predictions.items():
            self.correct[row] += int((predicted == labels).sum())
            self.agreeing[row] += int((predicted == predictions["ensemble"]).sum())
        self.coopvec_sum += w.sum(0)
        self.max_sum += float(w.amax(1).sum())
        self.entropy_sum -= float(torch.special.xlogy(w, w).sum())
        if self.own is not None:
            self.own_is_argmax += int((w.argmax(1) == self.own).sum())

    def accuracy(self) -> dict[str, float]:
        """Row -> percent of correct answers."""
        return {row: 100 * count / self.samples for row, count in self.correct.items()}

    def agreement(self) -> dict[str, float]:
        """Row -> percent of the images that get the ensemble's answer."""
        return {row: 100 * count / self.samples for row, count in self.agreeing.items()}

    def coopvec(self) -> dict[str, float | list[float] | None]:
        """Statistics of the CoopVecs over this task's images; entropy in nats."""
        return {
            "max": self.max_sum / self.samples,
            "entropy": self.entropy_sum / self.samples,
            "argmax_is_task": None if self.own is None else self.own_is_argmax / self.samples,
            "mean": (self.coopvec_sum / self.samples).tolist(),
        }
