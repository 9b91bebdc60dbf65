"""PCB-Merging: elements of task vectors compete, within a vector and between vectors.

    a_i = exp(N m(|d_i|)^2)              of task vector d_i: how it stands among its own elements
    b_i = a_i tanh(d_i sum_j d_j)        and with the other N - 1
    s_i = m(max(b_i, q_i))               q_i: the density's largest b_i are above it
    theta = theta_0 + lambda sum_i s_i d_i / max(sum_i s_i, 1e-12)

m(x) = (x - min x) / (max x - min x); magnitudes in the first m are clipped to their quantiles 1e-4
and 1 - 1e-4. Quantiles are elements, not between two: of n elements the lower one is the
floor(1e-4 n) + 1-th smallest, the upper one the floor(1e-4 n) + 1-th largest, and q_i the
n - floor((1 - density) n)-th largest. Where all elements are equal, m is 0: scores that are alike
leave the base. NaN has no rank, is not among the n, and makes an element NaN. As in the authors'
code, n is of the whole model; with the scope ``tensor`` it is of each tensor.

Source: Du et al., "Parameter Competition Balancing for Model Merging", NeurIPS 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from ._blocks import blocks
from ._largest import magnitudes_of_rank, task_vectors
from ._method import Apply, Measure, Method, Parameter, Task, Tile, of_block, weights_tensor

if TYPE_CHECKING:
    from torch import Tensor

_CLIPPED = 1e-4  # of magnitudes, at either end
_TINY = 1e-12


@dataclass(frozen=True)
class Scores:
    """b_i of a task vector, from the magnitudes that it is clipped to.

    Called with a tile, it gives block by block the magnitudes of what is positive and of what is
    negative.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]

    def of(self, d: Tensor) -> Tensor:
        """(N, P) of task vectors (N, P)."""
        import torch

        low, high = (weights_tensor(bound, d)[:, None] for bound in (self.low, self.high))
        share = _share(d.abs().clamp(low, high), low, high)
        return torch.exp(len(d) * share.square()) * torch.tanh(d * d.sum(0))

    def __call__(self, tile: Tile) -> Iterator[tuple[Tensor, None]]:
        import torch

        for _, _, d in blocks(tile):
            scores = self.of(d)
            yield torch.cat([scores.clamp(min=0), (-scores).clamp(min=0)]), None


class Balanced(NamedTuple):
    """How scores are found, and between which the share of an element grows from 0 to 1."""

    scores: Scores
    least: Sequence[float]
    most: Sequence[float]


def _measure(task: Task) -> Measure:
    models = task.models
    ranks = [[lambda n: int(_CLIPPED * n) + 1] * models, [lambda n: n - int(_CLIPPED * n)] * models]
    high, low = yield from magnitudes_of_rank(task, ranks, task_vectors)
    scores = Scores(low, high)
    kept = [_kept(share) for share in task.each("density")]
    least, most = yield from magnitudes_of_rank(
        task, [[*kept, *map(_from_below, kept)], [1] * (2 * models)], scores
    )
    if 0 in most[:models]:  # of an expert no score is positive
        (last,) = yield from magnitudes_of_rank(task, [[lambda n: n] * (2 * models)], scores)
        most = (*most[:models], *last[models:])
    return Balanced(scores, _signed(least), _signed(most))


def _kept(share: float) -> Callable[[int], int]:
    return lambda n: max(n - int((1 - share) * n), 1)


def _from_below(rank: Callable[[int], int]) -> Callable[[int], int]:
    return lambda n: n - rank(n) + 1


def _signed(found: Sequence[float]) -> list[float]:
    """Scores, from their positive and negative parts."""
    half = len(found) // 2
    return [up if up > 0 else -down for up, down in zip(found[:half], found[half:], strict=True)]


def _merge(task: Task, balanced: Balanced) -> Apply:
    def apply(tile: Tile, out: Tensor) -> None:
        least, most = (
            weights_tensor(bound, tile.rows)[:, None] for bound in (balanced.least, balanced.most)
        )
        for place, base, d in blocks(tile):
            share = _share(balanced.scores.of(d).clamp(min=least), least, most)
            change = (share * d).sum(0) / share.sum(0).clamp(min=_TINY)
            out[place] = (base + task.value("lambda") * change).to(out.dtype)

    return apply


def _share(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Where x is between the bounds, from 0 to 1; 0 where there is nothing between them."""
    return (x - low) / (high - low).where(high != low, 1)


METHODS = (
    Method(
        name="pcb",
        title="PCB-Merging",
        source="Du et al., NeurIPS 2024",
        parameters={
            "density": Parameter(0.1, each=True, low=0, high=1),
            "lambda": Parameter(1.0),
        },
        measure=_measure,
        of_model=("density",),
        scopes={"paper": "model"},
        apply=_merge,
        base="needed",
        fewest=2,
        most=80,
        parities=("paper",),
        piece=of_block,
    ),
)
