"""``nf.align``: from experts to an :class:`Alignment`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import length_hint
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from torch import Tensor, nn

from .. import _checks
from .activations import ActivationMoments
from .batches import exactly
from .inputs import InconclusiveError
from .matchings import Orders, Zips
from .networks import Networks
from .result import Alignment, squared_distances
from .similarity import KINDS, Kind, Pair
from .spec import Spec, check_tensors
from .specify import spec_for
from .sweeps import ORDERS, PATIENCE, Order, Outcome, Schedule, Sweeps
from .verifier import verify
from .weights import WeightSimilarity

if TYPE_CHECKING:
    from .._experts import Expert
    from ..pool import ExpertPool

MATCHES = ("align", "zip")
_GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def align(
    experts: Iterable[Expert] | ExpertPool,
    spec: Spec | None = None,
    data: Iterable[Any] | None = None,
    balance: float = 0.5,
    match: str = "align",
    seed: int = 0,
    *,
    template: nn.Module | None = None,
    similarity: Kind = "correlation",
    order: Order = "colour",
    sweeps: int = 100,
    progress: bool = False,
) -> Alignment:
    """Find the order of units in which networks of different origin are most alike (MuDSC).

    Averaging networks that were trained from different initialisations destroys them, because their
    units have no common order. The units of every expert are matched to those of expert 0 by a mix
    of how alike they are in weights and in activations (arXiv 2403.01753).

    Args:
        experts: N modules or state dicts of one architecture, or an ``ExpertPool``. Read only.
        spec: which axes move together; default ``alignment.spec_for(template)``. One of your own
            is judged by ``alignment.verify`` where there is a module to run.
        data: batches of images, or (images, ...) tuples, unlabelled. Every expert
            runs on them once.
        balance: the share of the weights' similarity, 0 to 1; the rest is the activations'. 1 needs
            no data and 0 needs no weights.
        match: ``"align"``: permutations; every expert computes what it did. ``"zip"``: units may
            join others, also of their own network; only the merge of all is a network.
        seed: of the random orders.
        template: the module that state dicts are of; default expert 0 when that is a module.
        similarity: of weights: ``"correlation"``, or Git Re-Basin's ``"inner_product"``, which goes
            with ``balance=1`` only.
        order: ``"colour"`` visits nodes that do not see each other together, ``"seeded"`` in random
            orders, as published. Either may end where the other would have gone on.
        sweeps: at most so many visits of every node.
        progress: show it.

    Returns:
        The matchings with their values. Ctrl-C while it sweeps returns the best so far.

    Raises:
        TypeError: an expert that is neither module nor mapping.
        ValueError: unfit arguments, no data where activations are asked for, experts that differ or
            do not fit the spec, activations that are not finite or that cannot be seen.
    """
    aligner = Aligner(
        experts, spec, data, template=template, match=match, similarity=similarity,
        progress=progress,
    )  # fmt: skip
    return aligner.align(balance, order=order, seed=seed, sweeps=sweeps)


class Aligner:
    """Networks whose activations' similarities are kept, to align them with several balances.

    Args: as of :func:`align`. ``data`` is run once, when a balance first needs it.

    Raises: as :func:`align`.
    """

    def __init__(
        self,
        experts: Iterable[Expert] | ExpertPool,
        spec: Spec | None = None,
        data: Iterable[Any] | None = None,
        *,
        template: nn.Module | None = None,
        match: str = "align",
        similarity: Kind = "correlation",
        progress: bool = False,
    ) -> None:
        _checks.raise_all("align", _kind_faults(match, similarity))
        self.networks = Networks(experts, template)
        if spec is None and self.networks.template is None:
            raise ValueError("align: state dicts alone do not tell their architecture; pass spec=")
        self.spec = spec_for(self.networks.template) if spec is None else spec
        check_tensors(self.spec, self.networks[0], "align")
        _checks.raise_all("align", _idle_nodes(self.spec))
        self._judge()
        self.match, self.similarity, self.data = match, similarity, data
        self._progress = progress
        self._activations: dict[str, Mapping[Pair, Tensor]] | None = None
        self._distances = squared_distances(self.networks, self.networks.parameters())

    def align(
        self, balance: float = 0.5, *, order: Order = "colour", seed: int = 0, sweeps: int = 100
    ) -> Alignment:
        """See :func:`align`."""
        _checks.raise_all("align", self._faults(balance, order, sweeps))
        patience = 1 if self.similarity == "inner_product" else PATIENCE
        schedule = Schedule(order, seed, sweeps, patience)
        with exactly(self.networks.device):
            return self._result(self._outcome(balance, schedule), balance)

    def _outcome(self, balance: float, schedule: Schedule) -> Outcome:
        kind = Orders if self.match == "align" else Zips
        matchings = kind(self.spec, len(self.networks))
        if len(self.networks) == 1:
            return Outcome(dict(matchings.current), converged=True)
        activations = self.activations(matchings.pairs) if balance < 1 else None
        weights = None
        if balance > 0:
            pairs = matchings.pairs
            weights = WeightSimilarity(self.networks, self.spec, pairs, matchings, self.similarity)
        sweeper = Sweeps(self.spec, weights, activations, balance, matchings)
        with self._bars() as bars:
            bar = bars.add_task("matching", total=None)
            return sweeper.run(schedule, lambda value: _advance(bars, bar, value))

    def choose_balance(
        self,
        score: Callable[[Mapping[str, Tensor]], float],
        grid: Iterable[float] = _GRID,
        **settings: Any,
    ) -> tuple[Alignment, dict[float, float]]:
        """The alignment whose merge scores best, and the scores by balance.

        Every balance costs a matching; the activations are those of one run. Labels that ``score``
        reads make this a calibration: it is no longer free of them.

        Args:
            score: of a merged state dict; larger is better, NaN worst.
            grid: of balances; the first of equals is taken.
            settings: of :meth:`align`.

        Raises:
            ValueError: an empty grid, or, for any of its balances, as :meth:`align`.
        """
        grid = list(grid)
        if not grid:
            raise ValueError("choose_balance: grid must name at least one balance, got none")
        loop = {"order": "colour", "sweeps": 100, **settings}
        faults = [f for one in grid for f in self._faults(one, loop["order"], loop["sweeps"])]
        _checks.raise_all("align", dict.fromkeys(faults))
        scores: dict[float, float] = {}
        best: tuple[float, Alignment] | None = None
        for balance in grid:
            alignment = self.align(balance, **settings)
            scores[balance] = score(alignment.merge())
            worth = -math.inf if math.isnan(scores[balance]) else scores[balance]
            if best is None or worth > best[0]:
                best = worth, alignment
            if alignment.interrupted:
                break
        return best[1], scores  # type: ignore[index]

    def activations(self, pairs: Sequence[Pair]) -> dict[str, Mapping[Pair, Tensor]]:
        """Per node and pair of networks, (n, n): the correlation of activations on the data."""
        if self._activations is None and self.data is not None:
            moments = ActivationMoments(self.networks, self.spec, pairs)
            with self._bars() as bars:
                bar = bars.add_task("activations", total=length_hint(self.data) or None)
                moments.collect(self.data, lambda: bars.advance(bar))
            self._activations = {node: moments.similarity(node) for node in self.spec.nodes}
        return self._activations or {}

    def _judge(self) -> None:
        """ValueError if a spec that nothing stands behind is wrong, as far as that can be told."""
        if self.spec.confirmed or self.networks.template is None:
            return
        with contextlib.suppress(InconclusiveError):
            verify(self.networks.template, self.spec)

    def _bars(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        console = Console(stderr=True)
        return Progress(*columns, TimeElapsedColumn(), console=console, disable=not self._progress)

    def _faults(self, balance: float, order: str, sweeps: int) -> Iterator[str]:
        if not 0 <= balance <= 1:
            yield f"balance must be 0 to 1, got {balance}"
        elif balance < 1 and self.data is None:
            yield (
                f"balance={balance} asks for activations: pass data=, batches of images, or "
                "balance=1 to match weights alone"
            )
        if self.similarity == "inner_product" and balance != 1:
            yield f"similarity='inner_product' goes with balance=1 only, got balance={balance}"
        if order not in ORDERS:
            yield f"order must be one of {', '.join(ORDERS)}, got {order!r}"
        if sweeps < 1:
            yield f"sweeps must be 1 or more, got {sweeps}"

    def _result(self, outcome: Outcome, balance: float) -> Alignment:
        result = Alignment(
            spec=self.spec,
            match=self.match,
            matchings=outcome.matchings,
            balance=balance,
            value=outcome.value,
            values=outcome.values,
            distances_before=self._distances,
            distances_after=None,
            converged=outcome.converged,
            interrupted=outcome.interrupted,
            names=self.networks.names,
            experts=list(self.networks),
            template=self.networks.template,
        )
        if self.match == "align":
            aligned = [result.apply(i) for i in range(len(self.networks))]
            result.distances_after = squared_distances(aligned, self.networks.parameters())
        return result


def _advance(bars: Progress, bar: TaskID, value: float) -> None:
    bars.update(bar, advance=1, description=f"matching, mean similarity {value:.4f}")


def _kind_faults(match: str, similarity: str) -> Iterator[str]:
    if match not in MATCHES:
        hint = _checks.did_you_mean(match, MATCHES)
        yield f"match must be one of {', '.join(MATCHES)}, got {match!r}{hint}"
    if similarity not in KINDS:
        hint = _checks.did_you_mean(similarity, KINDS)
        yield f"similarity must be one of {', '.join(KINDS)}, got {similarity!r}{hint}"


def _idle_nodes(spec: Spec) -> Iterator[str]:
    for name in spec.nodes:
        if all(use.role == "stat" for use in spec.uses_of(name)):
            yield f"node {name} has no weight, bias or gain to compare"
