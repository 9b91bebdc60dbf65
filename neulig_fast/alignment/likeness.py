"""A score for merges that needs no labels: how like their experts' ensemble they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..encoders.template import evaluating, run
from .batches import images_in

_TINY = 1e-12  # a length; shorter outputs have no direction


class EnsembleLikeness:
    """The mean cosine between a network's outputs and the mean of its experts', on images.

    Outputs are scaled to unit length first, as CLIP compares them. Without labels it tells which of
    several merges does most nearly what all experts together do, which is what a merge is for; it
    does not tell whether the experts are right. ``Aligner.choose_balance`` takes it as a score.

    Args:
        experts: state dicts of one architecture. Their order of units does not matter.
        template: the module that they are of; it maps a batch to (B, D).
        data: batches of images, or (images, ...) tuples; read once per network.

    Raises:
        TypeError: data that yields something else.
        ValueError: no images, or data that can be read only once.
    """

    def __init__(
        self, experts: Iterable[Mapping[str, Tensor]], template: nn.Module, data: Iterable[Any]
    ) -> None:
        if isinstance(data, Iterator):
            raise ValueError("EnsembleLikeness: data is read once per network, got an iterator")
        self._template, self._data = template, data
        self._target: list[Tensor] = []
        for expert in experts:
            outputs = list(self._outputs(expert))
            sums = zip(self._target or [0.0] * len(outputs), outputs, strict=True)
            self._target = [before + output for before, output in sums]
        if not self._target:
            raise ValueError("EnsembleLikeness: data must yield at least one batch of images")

    def __call__(self, state: Mapping[str, Tensor]) -> float:
        """Of a merged state dict: -1 to 1."""
        pairs = zip(self._outputs(state), self._target, strict=True)
        cosines = torch.cat([F.cosine_similarity(own, target) for own, target in pairs])
        return float(cosines.mean())

    @torch.no_grad()
    def _outputs(self, state: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """(B, D) fp64, of unit length, on the CPU, wherever the network is."""
        with evaluating(self._template):
            for images in images_in(self._data, state, "EnsembleLikeness"):
                yield F.normalize(run(self._template, state, images).cpu().double(), eps=_TINY)
