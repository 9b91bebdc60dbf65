"""Activation space: how alike units are in what they do on the same images.

Moments are summed while the networks run, batch by batch; activations of one batch are all that is
ever held. They are shifted by the first batch's means, so that a unit whose mean is many times its
deviation keeps its variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import accumulation_dtype, raise_all
from ..encoders.template import call, evaluating
from ..ops.cross_moments import cross_moments
from .batches import exactly, images_in
from .networks import Networks
from .similarity import Pair, Rows, correlation
from .spec import Spec, Use
from .taps import Taps, taps_of

_IMAGES = 32  # run at a time: the activations of so many are held


class _Seen(NamedTuple):
    use: Use
    rows: Tensor


class ActivationMoments:
    """Streamed moments of every node's units in pairs of networks.

    Args:
        networks: with a template to run.
        pairs: (i, j) with i <= j, the similarities that are wanted.
    """

    def __init__(self, networks: Networks, spec: Spec, pairs: Sequence[Pair]) -> None:
        self.networks, self.spec, self.pairs = networks, spec, tuple(pairs)
        self.count = dict.fromkeys(spec.nodes, 0)  # samples, positions included
        # A network is in many pairs, and its own sums are taken from the first of them alone.
        self._source: dict[int, tuple[Pair, int]] = {}
        for pair in self.pairs:
            for side, network in enumerate(pair):
                self._source.setdefault(network, (pair, side))
        self._shifts: dict[tuple[int, str], Tensor] = {}
        self._rows: dict[tuple[int, str], Rows] = {}
        self._cross: dict[tuple[Pair, str], Tensor] = {}
        self._broken: list[str] = []

    @torch.no_grad()
    def collect(self, data: Iterable[Any], advance: Callable[[], None] | None = None) -> None:
        """Run all networks on all batches of images, or (images, ...) tuples.

        Raises:
            ValueError: no template, no data, a node whose activations no network shows,
                activations that are not finite.
        """
        if self.networks.template is None:
            raise ValueError("align: data is given but no module to run on it; pass template=")
        batches = 0
        with evaluating(self.networks.template), exactly(self.networks.device):
            for images in images_in(data, self.networks[0], "align"):
                batches += 1
                for some in images.split(_IMAGES):
                    self._add(some)
                if advance is not None:
                    advance()
        if not batches:
            raise ValueError("align: data must yield at least one batch of images, got none")
        unseen = [name for name, count in self.count.items() if not count]
        raise_all("align", (self._unseen(name) for name in unseen))

    def similarity(self, node: str) -> dict[Pair, Tensor]:
        """(n, n) per pair: the correlation of the node's units over all samples."""
        return {
            (i, j): correlation(
                self._cross[(i, j), node],
                self._rows[i, node],
                self._rows[j, node],
                self.count[node],
            )
            for i, j in self.pairs
        }

    def _add(self, images: Tensor) -> None:
        held: dict[int, list[_Seen]] = {}
        for j in range(len(self.networks)):
            seen = self._run(j, images)
            held[j] = seen
            for i in [i for i, other in self.pairs if other == j]:
                self._add_pair((i, j), held[i], seen)
            if all(i != j for i, _ in self.pairs):
                held[j] = []  # the first of no pair that is still to come
        raise_all("align", self._broken)

    def _run(self, i: int, images: Tensor) -> list[_Seen]:
        seen: list[_Seen] = []
        tensors = self.networks[i]
        # A copy: a residual added in place would change what is held.
        with Taps(self.spec, tensors, lambda use, rows: seen.append(_Seen(use, rows.clone()))):
            call(self.networks.template, tensors, images)
        return seen

    def _add_pair(self, pair: Pair, first: list[_Seen], second: list[_Seen]) -> None:
        for (use, x), (_, y) in zip(first, second, strict=True):
            node = use.node
            shifts = [self._shift(i, node, rows) for i, rows in zip(pair, (x, y), strict=True)]
            moments = cross_moments(x, y, *shifts)
            self._cross[pair, node] = moments.cross + self._cross.get((pair, node), 0)
            own = (moments.x_sum, moments.x_square), (moments.y_sum, moments.y_square)
            for side, (network, (sums, squares)) in enumerate(zip(pair, own, strict=True)):
                if self._source[network] == (pair, side):
                    self._check_finite(network, use, squares)
                    rows = Rows(sums.double(), squares.double())
                    known = self._rows.get((network, node))
                    self._rows[network, node] = rows if known is None else known + rows
            if pair == self.pairs[0]:
                self.count[node] += x.shape[:-1].numel()

    def _shift(self, network: int, node: str, rows: Tensor) -> Tensor:
        """The means over the first batch."""
        if (network, node) not in self._shifts:
            means = rows.double().mean(tuple(range(rows.ndim - 1)))
            self._shifts[network, node] = means.to(accumulation_dtype(rows.dtype))
        return self._shifts[network, node]

    def _check_finite(self, network: int, use: Use, squares: Tensor) -> None:
        bad = int((~squares.isfinite()).sum())
        if bad:
            self._broken.append(
                f"{bad} of {len(squares)} units of node {use.node} have activations that are NaN "
                f"or infinite in {self.networks.names[network]}, at {use.tensor}"
            )

    def _unseen(self, node: str) -> str:
        tensors = ", ".join(use.tensor for use in taps_of(self.spec, node))
        return (
            f"node {node} was not seen at work: no matrix product or convolution took "
            f"{tensors or 'any tensor of its own'}"
        )
