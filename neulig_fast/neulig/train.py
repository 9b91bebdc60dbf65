"""Training the Portland over cached features.

Adam at lr 1e-3 with default betas. One round is one step per task, in the tasks' order; an epoch
is as many rounds as the task with the fewest batches has, so larger tasks are sub-sampled afresh
in every epoch (NeuLig, arXiv 2503.01268).

Reproducible to the bit: the order of a task's rows is drawn from (seed, epoch, task), the start
values from the seed, nothing from the global generator. With a checkpoint, a fit that was killed
goes on from its last saved epoch and ends with the bits of one that was not.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.neulig_loss import neulig_loss
from .checkpoint import Checkpoint
from .heads import Head
from .history import Callback, EpochReport, History
from .penalty import Penalty
from .portland import Portland, ensemble_features
from .steps import AdamState, products_of, rounds_per_call, run_rounds

_NAMES = ("weight", "bias")  # of the Portland, in the order of its parameters
_NEEDS = [False, True, True, False, False, False]  # the gradients of these two


class TaskData(NamedTuple):
    """One task's cached rows: ``features`` (V·M, N, D), ``labels`` (V·M,) or None, ``views`` V.

    View v is rows v·M up to (v+1)·M; epoch k trains on view k mod V.
    """

    name: str
    features: Tensor
    labels: Tensor | None
    head: Head
    views: int = 1


def derived_generator(*key: int | str) -> torch.Generator:
    """A generator of its own for every key, on the CPU; not Python's salted hash()."""
    text = "/".join(map(str, key)).encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
    return torch.Generator().manual_seed(seed)


@dataclasses.dataclass(frozen=True)
class FitSettings:
    """The knobs of the loop; see :meth:`NeuLig.fit`."""

    epochs: int = 100
    lr: float = 1e-3
    batch_size: int = 128
    boosting: str = "supervised"
    scaling: float = 100.0
    patience: int | None = None
    starts: int = 1
    seed: int = 0
    checkpoint_every: int = 10


class Trainer:
    """One fit: all starts of it. Deterministic; see the module's text.

    Args:
        tasks: the training rows, at least one task with at least one row each.
        penalty: the alignment term.
        validation: rows with labels, per task, or none.
        checkpoint: where to save; None saves nothing.
    """

    def __init__(
        self,
        tasks: Sequence[TaskData],
        penalty: Penalty,
        settings: FitSettings,
        validation: Sequence[TaskData] = (),
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.tasks, self.validation, self.settings = tuple(tasks), tuple(validation), settings
        self.checkpoint, self.centered = checkpoint, penalty.centered
        features = self.tasks[0].features
        dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
        self.matrix = penalty.matrix.to(features.device, dtype)
        self.one = self.matrix.new_ones(())
        sizes = [len(task.features) // task.views for task in self.tasks]
        self.rounds = min(-(-size // settings.batch_size) for size in sizes)
        self.cached = products_of(self.tasks, dtype, settings, self.rounds)
        count, epochs, starts = len(self.tasks), settings.epochs, settings.starts
        self.terms = features.new_zeros((starts, epochs * self.rounds, count, 2), dtype=dtype)
        self.accuracy = torch.full((starts, epochs, count), torch.nan, dtype=torch.float64)
        self.start = self.epoch = 0
        self._begin()
        self._keep(-1.0)  # any accuracy is better

    def _begin(self) -> None:
        """A fresh Portland and optimiser for the current start."""
        _, n, d = self.tasks[0].features.shape
        portland = Portland(n, d, self.settings.seed + self.start, self.matrix.dtype)
        self.portland = portland.to(self.matrix.device)
        self.adam = AdamState(self.portland, self.settings.lr)

    # -- the loop ------------------------------------------------------------------------------

    def run(self, callback: Callback | None = None) -> tuple[Portland, History]:
        """Train from the start, or from the checkpoint when it holds a state.

        Any exception, KeyboardInterrupt included, first saves the last finished epoch.

        Raises:
            ValueError: an epoch with a loss or weights that are not finite, and its task.
        """
        saved = self.checkpoint.read() if self.checkpoint else None
        if saved is not None:
            self._restore(*saved)
        finished = saved
        try:
            while self.start < self.settings.starts:
                if self._exhausted():
                    self.start, self.epoch = self.start + 1, 0
                    self._begin()
                else:
                    self._run_epoch()
                    self.epoch += 1
                    finished = self._state()
                    if self.checkpoint and self.epoch % self.settings.checkpoint_every == 0:
                        self.checkpoint.write(*finished)
                    if callback is not None:
                        callback(self._report())
        finally:  # also when interrupted: a finished epoch is never lost
            if self.checkpoint and finished is not None:
                self.checkpoint.write(*finished)
        return self._result()

    def _exhausted(self) -> bool:
        """Whether the current start has run all its epochs, or out of patience."""
        patience = self.settings.patience
        if self.epoch == 0 or patience is None or not self.validation:
            return self.epoch >= self.settings.epochs
        means = self.accuracy[self.start, : self.epoch].mean(1)
        since = self.epoch - 1 - int((means == means.max()).nonzero()[0])
        return self.epoch >= self.settings.epochs or since >= patience

    def _run_epoch(self) -> None:
        size, first = self.settings.batch_size, self.epoch * self.rounds
        orders = [self._order(t) for t in range(len(self.tasks))]
        chunk = rounds_per_call(self.tasks, size)
        for k in range(0, self.rounds, chunk):
            stop = min(k + chunk, self.rounds)
            rows = [order[k * size : stop * size] for order in orders]
            self._run_rounds(rows, self.terms[self.start, first + k : first + stop])
        self._check_finite(self.terms[self.start, first : first + self.rounds])
        mean = 0.0
        if self.validation:
            self.accuracy[self.start, self.epoch] = self._validate()
            mean = float(self.accuracy[self.start, self.epoch].mean())
        # Of equally good epochs of one start the last is kept: its CoopVecs are the most decided.
        if mean > self.best or (mean == self.best and self.best_start == self.start):
            self._keep(mean)

    def _check_finite(self, terms: Tensor) -> None:
        """Once per epoch: every look waits for a GPU."""
        where = f"fit: in epoch {self.epoch + 1}, lr {self.settings.lr:g},"
        bad = (~terms.isfinite().all(2)).flatten().nonzero()
        if len(bad):
            task = self.tasks[int(bad[0]) % len(self.tasks)]  # the first; it infects the others
            raise ValueError(f"{where} the loss of task {task.name!r} is not finite")
        if not self.portland.weight.isfinite().all():
            raise ValueError(f"{where} the Portland's weights are not finite")

    def _order(self, t: int) -> Tensor:
        """The row numbers of task ``t`` in the order of this epoch."""
        task = self.tasks[t]
        size = len(task.features) // task.views
        generator = derived_generator(self.settings.seed + self.start, self.epoch, t)
        order = torch.randperm(size, generator=generator)
        return (order + self.epoch % task.views * size).to(task.features.device)

    def _run_rounds(self, rows: list[Tensor], terms: Tensor) -> None:
        """Rounds on these rows of every task; ``terms`` (R, T, 2) receives their loss terms."""
        if self.cached is not None:
            data = (self.tasks, self.cached, rows, self.matrix, self.centered)
            terms.copy_(run_rounds(self.adam, *data, self.settings))
            return
        batches = [order.split(self.settings.batch_size) for order in rows]
        for k in range(len(terms)):
            for t, task in enumerate(self.tasks):
                self._step(task, batches[t][k], terms[k, t])

    @torch.no_grad()
    def _step(self, task: TaskData, rows: Tensor, terms: Tensor) -> None:
        """One step of Adam on some rows of a task; ``terms`` (2,) receives its loss terms."""
        head, settings = task.head, self.settings
        weight, bias = self.portland.weight, self.portland.bias
        features = task.features[rows]
        supervised = settings.boosting == "supervised"
        targets = task.labels[rows] if supervised and task.labels is not None else None
        out = neulig_loss(
            *(features, weight, bias, head.weight, head.bias, targets, self.matrix),
            boosting=settings.boosting,
            scaling=settings.scaling,
            normalize=head.normalize,
            centered=self.centered,
        )
        # The gradient's op by itself: of a small step, autograd's way to it takes a large
        # share.
        _, weight.grad, bias.grad, *_ = torch.ops.neulig_fast.neulig_loss_backward.default(
            *(self.one, None, None, None, out.coopvec, features, weight),
            *(head.weight, head.bias, targets, self.matrix),
            *(settings.boosting, settings.scaling, head.normalize, self.centered, _NEEDS),
        )
        self.adam.optimizer.step()
        # No .item(): it would wait for a GPU in every step.
        torch.stack((out.boosting, out.alignment), out=terms)

    @torch.no_grad()
    def _validate(self) -> Tensor:
        correct = []
        for task in self.validation:
            w = self.portland.coopvec(task.features)
            predicted = task.head(ensemble_features(w, task.features)).argmax(1)
            correct.append((predicted == task.labels).double().mean())
        return 100 * torch.stack(correct).cpu()

    def _keep(self, accuracy: float) -> None:
        """The weights after the current epoch become the best ones."""
        self.best, self.best_start, self.best_epoch = accuracy, self.start, self.epoch + 1
        self.kept = [p.detach().clone() for p in (self.portland.weight, self.portland.bias)]

    # -- what a checkpoint holds, and what comes out -------------------------------------------

    def _state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Copies of all that the next epoch depends on. Loss terms and accuracies are no copies:
        an interrupted epoch may have touched its own rows, and will write them again."""
        tensors = {"terms": self.terms, "accuracy": self.accuracy}
        trained = zip(_NAMES, self.portland.parameters(), self.kept, strict=True)
        for name, parameter, kept in trained:
            tensors[name] = parameter.detach().clone()
            tensors[f"best.{name}"] = kept
            for key, value in self.adam.optimizer.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = value.detach().clone()
        progress = {
            "start": self.start,
            "epoch": self.epoch,
            "best": self.best,
            "best_start": self.best_start,
            "best_epoch": self.best_epoch,
        }
        return tensors, progress

    def _restore(self, tensors: dict[str, Tensor], progress: dict[str, float]) -> None:
        self.start, self.epoch = int(progress["start"]), int(progress["epoch"])
        self.best = progress["best"]
        self.best_start, self.best_epoch = int(progress["best_start"]), int(progress["best_epoch"])
        self._begin()
        self.terms.copy_(tensors["terms"])
        self.accuracy.copy_(tensors["accuracy"])
        device = self.matrix.device
        self.kept = [tensors[f"best.{name}"].to(device) for name in _NAMES]
        with torch.no_grad():
            for name, parameter in zip(_NAMES, self.portland.parameters(), strict=True):
                parameter.copy_(tensors[name])
                for key, value in self.adam.optimizer.state[parameter].items():
                    value.copy_(tensors[f"adam.{name}.{key}"])

    def _report(self) -> EpochReport:
        stop = self.epoch * self.rounds
        terms = self.terms[self.start, stop - self.rounds : stop].double().mean((0, 1))
        accuracy = None
        if self.validation:
            accuracy = float(self.accuracy[self.start, self.epoch - 1].mean())
        return EpochReport(self.start, self.epoch, float(terms[0]), float(terms[1]), accuracy)

    def _result(self) -> tuple[Portland, History]:
        for parameter, kept in zip(self.portland.parameters(), self.kept, strict=True):
            parameter.data = kept  # no longer a part of Adam's state
        accuracy = self.accuracy[self.best_start]
        ran = self.settings.epochs
        if self.validation:
            ran = int(accuracy.isfinite().all(1).sum())
        terms = self.terms[self.best_start, : ran * self.rounds].cpu()
        best = self.accuracy.mean(2).nan_to_num(-1.0).amax(1)
        history = History(
            tuple(task.name for task in self.tasks),
            terms[..., 0].contiguous(),
            terms[..., 1].contiguous(),
            accuracy[:ran].clone() if self.validation else accuracy[:0].clone(),
            self.best_epoch,
            self.best_start,
            tuple(best.tolist()) if self.validation else (),
            self.rounds,
        )
        return self.portland, history
