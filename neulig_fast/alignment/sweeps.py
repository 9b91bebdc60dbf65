"""The loop of MuDSC: match node after node, each beside the newest matchings of its neighbours.

Nodes that move together (one tie) are a *group* and are matched at once. A group that is
as it was last matched, between neighbours as they were then, would be matched alike again and is
passed over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .matchings import Matchings
from .similarity import Pair
from .spec import Spec
from .weights import WeightSimilarity

Order = Literal["colour", "seeded"]
ORDERS = ("colour", "seeded")
PATIENCE = 5  # of MuDSC; Git Re-Basin's objective cannot fall, and its loop ends at once


@dataclass(frozen=True)
class Schedule:
    """How the loop goes.

    Attributes:
        order: ``"seeded"``: a new random order in every sweep, as published. ``"colour"``: groups
            that do not see each other together, in a fixed order while that helps, then in random
            orders as well.
        seed: of the random orders.
        sweeps: at most so many.
        patience: sweeps without a better value before the loop ends.
    """

    order: Order = "colour"
    seed: int = 0
    sweeps: int = 100
    patience: int = PATIENCE


@dataclass
class Outcome:
    """Attributes:
    matchings: the best, per node.
    value: theirs, the mean over nodes.
    values: mean matched similarity per node, a dict for the start (if activations gave one) and
        for every sweep.
    converged: it ended because nothing got better.
    interrupted: it was stopped from outside.
    """

    matchings: dict[str, Any]
    value: float = 0.0
    values: list[dict[str, float]] = field(default_factory=list)
    converged: bool = False
    interrupted: bool = False


class Sweeps:
    """Matches all nodes until their mean similarity stops growing.

    Args:
        weights: in weight space, with ``matchings`` as its layout; None: activations alone.
        activations: in activation space; None: weights alone.
        balance: the share of the weights where both are given.
        matchings: holds the current state and solves one group.
    """

    def __init__(
        self,
        spec: Spec,
        weights: WeightSimilarity | None,
        activations: Mapping[str, Mapping[Pair, Tensor]] | None,
        balance: float,
        matchings: Matchings,
    ) -> None:
        self.spec, self.weights, self.activations = spec, weights, activations
        self.balance, self.matchings = balance, matchings
        self.groups = grouped(spec)
        self._seen: dict[str, tuple[Any, ...]] = {}
        self._values: dict[str, float] = {}

    def run(self, schedule: Schedule, advance: Callable[[float], None]) -> Outcome:
        """Start from the activations' matching if there is one, then sweep.

        ``advance`` is called with the mean value after every sweep. A ``KeyboardInterrupt`` ends
        the loop with the best so far.
        """
        outcome = Outcome(dict(self.matchings.current))
        try:
            if self.activations is not None:
                self._visit(list(self.groups), self.activations.__getitem__)
                outcome.matchings = dict(self.matchings.current)
                outcome.values.append(dict(self._values))
                outcome.value = mean(self._values)
                advance(outcome.value)
            if self.weights is not None:
                self._sweep_until_stalled(self.weights, schedule, outcome, advance)
            else:
                outcome.converged = True
        except KeyboardInterrupt:
            outcome.interrupted = True
        return outcome

    def _sweep_until_stalled(
        self,
        weights: WeightSimilarity,
        schedule: Schedule,
        outcome: Outcome,
        advance: Callable[[float], None],
    ) -> None:
        generator = torch.Generator().manual_seed(schedule.seed)
        best, stalled = None, 0
        colours, names = self.colours(), list(self.groups)
        self._seen.clear()
        for _ in range(schedule.sweeps):
            classes = colours
            if schedule.order == "seeded" or stalled:
                places = torch.randperm(len(names), generator=generator, device="cpu").tolist()
                classes = [[names[k]] for k in places]
            for groups in classes:
                moved = [name for name in groups if self._moved(name)]
                self._visit(moved, lambda node: self._mixed(node, weights))
            value = self._objective(weights)
            outcome.values.append(dict(self._values))
            advance(value)
            if best is None or value > best:
                best, stalled = value, 0
                outcome.matchings = dict(self.matchings.current)
                outcome.value = mean(self._values)
                continue
            stalled += 1
            if stalled == schedule.patience:
                outcome.converged = True
                break
            for node, matching in outcome.matchings.items():
                self.matchings.set(node, matching)

    def colours(self) -> list[list[str]]:
        """Classes of groups, none of which sees another of its class; greedy, in spec order."""
        classes: list[list[str]] = []
        for name in self.groups:
            home = next((c for c in classes if not any(self._see(name, o) for o in c)), None)
            if home is None:
                classes.append(home := [])
            home.append(name)
        return classes

    def _see(self, one: str, other: str) -> bool:
        return any(node in self._neighbours(one) for node in self.groups[other])

    def _neighbours(self, group: str) -> list[str]:
        if self.weights is None:
            return []
        found = [other for node in self.groups[group] for other in self.weights.depends_on(node)]
        return sorted(set(found))

    def _moved(self, group: str) -> bool:
        """Whether a visit could change anything: a neighbour has another matching than at the last
        one, or the group itself another than that visit gave it."""
        return self._seen.get(group) != (
            self._versions(self._neighbours(group)),
            self._versions(self.groups[group]),
        )

    def _versions(self, nodes: Sequence[str]) -> tuple[int, ...]:
        return tuple(self.matchings.version(node) for node in nodes)

    def _visit(
        self, groups: Sequence[str], similarity: Callable[[str], Mapping[Pair, Tensor]]
    ) -> None:
        """Match groups that do not see each other: one is solved while another is compared."""
        threads = torch.get_num_threads()
        around = {name: self._versions(self._neighbours(name)) for name in groups}
        with ThreadPoolExecutor(threads) as pool:
            pending: deque[Future] = deque()
            for name in groups:
                nodes = self.groups[name]
                found = [similarity(node) for node in nodes]
                pending.append(pool.submit(self.matchings.solve, nodes, found))
                if len(pending) == threads:  # their similarities are all that is held
                    self._take(pending.popleft().result())
            for future in pending:
                self._take(future.result())
        for name in groups:
            self._seen[name] = around[name], self._versions(self.groups[name])

    def _take(self, solved: Mapping[str, tuple[Any, float]]) -> None:
        for node, (matching, value) in solved.items():
            self.matchings.set(node, matching)
            self._values[node] = value

    def _mixed(self, node: str, weights: WeightSimilarity) -> Mapping[Pair, Tensor]:
        similarities = weights.similarity(node)
        if self.activations is None:
            return similarities
        return {
            pair: torch.lerp(self.activations[node][pair], similarity, self.balance)
            for pair, similarity in similarities.items()
        }

    def _objective(self, weights: WeightSimilarity) -> float:
        """What has to grow: the mean over nodes, or the sum over units of inner products."""
        if weights.kind == "correlation":
            return mean(self._values)
        return sum(self.spec.nodes[name].size * value for name, value in self._values.items())


def grouped(spec: Spec) -> dict[str, list[str]]:
    """Nodes that are matched at once: those of one tie, all others alone."""
    groups: dict[str, list[str]] = {}
    for name, node in spec.nodes.items():
        groups.setdefault(f"tie {node.tie}" if node.tie is not None else name, []).append(name)
    return groups


def mean(values: Mapping[str, float]) -> float:
    """Over nodes; what an alignment's value is."""
    return sum(values.values()) / max(len(values), 1)
