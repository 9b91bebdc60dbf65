"""NeuLig: N frozen experts, merged so that the merge performs like their ensemble."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..ops.neulig_loss import BOOSTING
from ..pool import ExpertPool
from . import evaluate, fitting, modes, saving
from .features import FeatureCache
from .heads import Head
from .history import Callback, History
from .penalty import ALIGNMENTS, alignment_penalty
from .portland import Portland, ensemble_features

if TYPE_CHECKING:
    from .report import Report


class NeuLig:
    """A Portland over N experts: trained once, it weighs the experts for every image.

    ``fit`` trains it on cached features of the frozen experts; ``ensemble`` and
    ``merged_forward`` use its CoopVecs; ``merge`` makes one model per data set; ``evaluate``
    compares them all. NeuLig (arXiv 2503.01268).

    Args:
        experts: an ``ExpertPool``, or what it takes.
        heads: task -> :class:`Head`, all for features of one width D.
        alignment: ``variance`` (default), ``offset_sum`` (the paper's, with scaling 100),
            ``gram``, ``dispersion`` or ``none``; see :mod:`neulig_fast.neulig.penalty`.
        boosting: ``supervised``, or ``entropy``, which needs no labels. The latter depends on its
            start: fit it with several ``starts`` and a validation set. A strong ``variance``
            penalty sharpens its early mistakes; prefer ``none`` there.
        scaling: the alignment term is divided by it; default 10 for variance, else 100.
        seed: of the Portland's start and the order of training.
        cache_folder: keeps the experts' features between runs.

    Attributes:
        pool, heads, alignment, boosting, scaling, seed: as given (heads on the pool's device, in
            the Portland's dtype).
        portland: the trainable part. cache: the experts' features.
        alignment_matrix, centered: of the alignment term.
        history: of the last fit, or None. calibration: task -> (N,) float64 on the CPU, the mean
            CoopVec of the task's training images; empty before ``fit``.

    Raises:
        ValueError, TypeError: everything that does not fit, in one error.
    """

    def __init__(
        self,
        experts: ExpertPool | Iterable[nn.Module],
        heads: Mapping[str, Head],
        alignment: str = "variance",
        boosting: str = "supervised",
        scaling: float | None = None,
        seed: int = 0,
        *,
        cache_folder: str | Path | None = None,
    ) -> None:
        _checks.raise_all("NeuLig", _faults(heads, alignment, boosting, scaling, seed))
        self.pool = experts if isinstance(experts, ExpertPool) else ExpertPool(experts)
        width = next(iter(heads.values())).feature_dim
        _checks.raise_all("NeuLig", _width_faults(self.pool.template, heads))
        device, dtype = self.pool.params.device, self.pool.params.dtype
        dtype = _checks.accumulation_dtype(dtype)
        self.heads = {task: head.to(device, dtype) for task, head in heads.items()}
        penalty = alignment_penalty(alignment, self.pool.offsets(by="model"))
        self.alignment = alignment
        self.alignment_matrix, self.centered = penalty.matrix, penalty.centered
        self.boosting, self.seed = boosting, seed
        self.scaling = float(penalty.scaling if scaling is None else scaling)
        self.portland = Portland(self.pool.num_experts, width, seed, dtype).to(device)
        widths = {task: head.feature_dim for task, head in heads.items()}
        self.cache = FeatureCache(self.pool, cache_folder, widths)
        self.history: History | None = None
        self.calibration: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return (
            f"NeuLig({self.pool.num_experts} experts, tasks {', '.join(self.heads)}; "
            f"{self.boosting}, {self.alignment}/{self.scaling:g}, "
            f"{'fitted' if self.calibration else 'not fitted'})"
        )

    def fit(
        self,
        loaders: Mapping[str, Iterable[Any]],
        epochs: int = 100,
        lr: float = 1e-3,
        batch_size: int = 128,
        *,
        validation: Mapping[str, Iterable[Any]] | float | None = None,
        patience: int | None = None,
        starts: int = 1,
        views: int = 1,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 10,
        progress: bool = True,
        callback: Callback | None = None,
    ) -> NeuLig:
        """Train the Portland, from its seed, on the experts' features.

        Every image runs through every expert once; then the loop needs features only. For the
        same features and settings the result is the same to the bit on one machine, in whatever
        order the loaders bring the images. The features are, up to rounding: an encoder may
        round an image's differently in another batch.

        Args:
            loaders: task -> batches of (images, labels), one for every head. Bare batches of
                images will do when no labels are used (entropy without a validation fraction).
            epochs, lr, batch_size: of Adam; one step per task and batch, and as many batches per
                epoch as the smallest task has.
            validation: labelled loaders per task, or the fraction of every task's different
                images to set aside. The weights with the best mean accuracy of the ensemble are
                kept; without validation, the last ones.
            patience: stop after so many epochs without a better validation accuracy.
            starts: fit with the seeds seed, seed + 1, … and keep the best on validation.
            views: passes over the loaders, for loaders that augment; epoch k uses view k mod views.
                Seed the augmentation if the fit is to be repeated or resumed.
            checkpoint: a file that is saved every ``checkpoint_every`` epochs and when the fit is
                interrupted. Where it exists, the fit goes on from it and ends with the same bits.
                In an existing folder, every fit has a file of its own. When the disk fills up, the
                fit goes on with a ``NeuligFastWarning``.
            progress: show bars on stderr.
            callback: called with an :class:`EpochReport` after every epoch.

        Returns:
            The engine itself.

        Raises:
            ValueError, TypeError: settings, tasks or first batches that do not fit, all of them
                before any image is encoded; later batches; features that are zero under a head
                that normalises; a checkpoint of another fit, each difference named; a loss that is
                not finite.
            OSError: the checkpoint cannot be written, found before any image is encoded.
        """
        options = fitting.FitOptions(
            epochs,
            lr,
            batch_size,
            validation,
            patience,
            starts,
            views,
            checkpoint,
            checkpoint_every,
        )
        fitted = fitting.fit(self, loaders, options, progress, callback)
        self.portland, self.history, self.calibration = fitted
        return self

    def features(self, images: Tensor) -> Tensor:
        """Features (B, N, D) of all experts, from the cache or put there.

        Everything else that takes images (``coopvec``, ``ensemble``, ``merged_forward``) reads
        the cache but does not fill it.
        """
        return self.cache.features(images)

    @torch.no_grad()
    def coopvec(self, images: Tensor) -> Tensor:
        """CoopVecs (B, N) of a batch of images."""
        return self.portland.coopvec(self.cache.features(images, store=False))

    @torch.no_grad()
    def ensemble(self, images: Tensor, head: Head | str) -> Tensor:
        """Logits (B, C) of the ensembled features Σ_i w_bi z_bi; ``head`` or a task's name."""
        known, _ = modes.resolve_head(self, head)
        features = self.cache.features(images, store=False)
        return known(ensemble_features(self.portland.coopvec(features), features))

    def merged_forward(
        self, images: Tensor, head: Head | str, mode: str = "per_sample", **options: Any
    ) -> Tensor:
        """Logits (B, C) of merged models; see :func:`neulig_fast.neulig.modes.merged_forward`."""
        return modes.merged_forward(self, images, head, mode, **options)

    def merge(
        self,
        mode: str = "dataset",
        loader: Iterable[Any] | None = None,
        task: str | None = None,
        **options: Any,
    ) -> dict[str, Tensor]:
        """State dict of one merged model; see :func:`neulig_fast.neulig.modes.merge`."""
        return modes.merge(self, mode, loader=loader, task=task, **options)

    def evaluate(
        self,
        loaders: Mapping[str, Iterable[Any]],
        modes: Sequence[str] | None = None,
        **options: Any,
    ) -> Report:
        """Modes and baselines on every task; see :func:`neulig_fast.neulig.evaluate.evaluate`."""
        return evaluate.evaluate(self, loaders, modes, **options)

    def save(self, path: str | Path) -> None:
        """Write a folder that :meth:`load` reads: safetensors and JSON, the experts included.

        ``neulig.json`` is replaced last and names the other files, so a save that breaks off
        leaves what was there before.

        Raises:
            OSError: the disk is full or the like.
        """
        saving.save(self, path)

    @classmethod
    def load(
        cls,
        path: str | Path,
        template: nn.Module | None = None,
        *,
        device: torch.device | str | None = None,
        cache_folder: str | Path | None = None,
    ) -> NeuLig:
        """The engine that :meth:`save` wrote.

        Args:
            template: a module of the experts' architecture. Code is never stored, so without it
                everything works that runs no encoder (``merge`` with stored vectors, the Portland,
                the heads); the rest says that a template is missing.

        Raises:
            FileNotFoundError, ValueError: no such save, another format, damaged files, experts
                that do not fit the template.
        """
        return saving.load(cls, path, template, device, cache_folder)


def _faults(
    heads: Any, alignment: str, boosting: str, scaling: float | None, seed: int
) -> Iterator[str]:
    if not isinstance(heads, Mapping):
        example = "as in {'cars': Head(...)}"
        yield f"heads must map tasks to their Heads, {example}, got {type(heads).__name__}"
        return
    if not heads:
        yield "heads must map at least one task to its Head, got none"
        return
    for task, head in heads.items():
        if not isinstance(task, str) or not isinstance(head, Head):
            yield f"heads[{task!r}] must be a Head under a task's name, got {type(head).__name__}"
    if alignment not in ALIGNMENTS:
        hint = _checks.did_you_mean(alignment, ALIGNMENTS)
        yield f"alignment must be one of {', '.join(ALIGNMENTS)}, got {alignment!r}{hint}"
    if boosting not in BOOSTING:
        hint = _checks.did_you_mean(boosting, BOOSTING)
        yield f"boosting must be one of {', '.join(BOOSTING)}, got {boosting!r}{hint}"
    if scaling is not None and not (isinstance(scaling, Real) and 0 < scaling < math.inf):
        yield f"scaling must be positive and finite, got {scaling!r}"
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        yield f"seed must be an int >= 0 and < 2**63, got {seed!r}"


def _width_faults(template: nn.Module | None, heads: Mapping[str, Head]) -> Iterator[str]:
    """D as the encoder states it (open_clip: ``output_dim``), else as the first head has it."""
    stated = getattr(template, "output_dim", None)
    first = next(iter(heads))
    width = stated if isinstance(stated, int) else heads[first].feature_dim
    source = "the experts give" if isinstance(stated, int) else f"the head of {first!r} has"
    for task, head in heads.items():
        if head.feature_dim != width:
            yield f"the head of task {task!r} is for D = {head.feature_dim}, {source} D = {width}"
