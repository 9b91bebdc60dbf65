"""Weight space: how alike units are in the weights that produce and consume them.

A unit's row is everything that belongs to it: its rows of the weights, with the other axes in the
order their own nodes have at the time, its columns of the next weights, its biases and gains.
Running statistics are left out. The cross products of two networks are a sum over tensors; each
share is kept, and computed again only when the matching of one of its other axes has changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .networks import Networks
from .similarity import Kind, Pair, Rows, correlation
from .spec import Spec, Use


class Layout(Protocol):
    """What a kind of matching does to the axes of a tensor that are not the unit's own.

    ``moves_only``: it moves entries and joins none, so that sums over a row stay what they are.
    """

    moves_only: bool

    def arrange(self, tensor: Tensor, axis: int, uses: Sequence[Use], network: int) -> Tensor:
        """The tensor with one axis as the current matchings of its nodes have it."""

    def version(self, node: str) -> int:
        """Equal while the matching of a node is."""


class _Share(NamedTuple):
    """What the uses that depend on the same nodes add to the similarities of their own node."""

    versions: tuple[int, ...]
    cross: dict[Pair, Tensor]
    rows: dict[int, Rows]
    columns: int


class WeightSimilarity:
    """Similarities of a node's units in pairs of networks, from their weights.

    Args:
        pairs: (i, j) with i <= j, the similarities that are wanted.
        layout: the current matchings.
        kind: ``"correlation"``, MuDSC's; ``"inner_product"``, Git Re-Basin's.
    """

    def __init__(
        self,
        networks: Networks,
        spec: Spec,
        pairs: Sequence[Pair],
        layout: Layout,
        kind: Kind = "correlation",
    ) -> None:
        self.networks, self.spec, self.pairs = networks, spec, tuple(pairs)
        self.layout, self.kind = layout, kind
        self._used = sorted({network for pair in self.pairs for network in pair})
        self._uses = {node: self._grouped(node) for node in spec.nodes}
        self._shares: dict[tuple[str, tuple[str, ...]], _Share] = {}
        self._rows: dict[tuple[str, tuple[str, ...]], dict[int, Rows]] = {}

    def similarity(self, node: str) -> dict[Pair, Tensor]:
        """(n, n) per pair."""
        shares = [self._share(node, others) for others in self._uses[node]]
        cross = {pair: _total([share.cross[pair] for share in shares]) for pair in self.pairs}
        if self.kind == "inner_product":
            return cross
        count = sum(share.columns for share in shares)
        rows = {i: _total([share.rows[i] for share in shares]) for i in self._used}
        return {(i, j): correlation(cross[i, j], rows[i], rows[j], count) for i, j in self.pairs}

    def depends_on(self, node: str) -> frozenset[str]:
        """The nodes whose matchings enter the similarity of this one."""
        return frozenset(name for others in self._uses[node] for name in others)

    def _grouped(self, node: str) -> dict[tuple[str, ...], list[Use]]:
        """The node's uses by the other nodes of their tensors.

        Those without any are a few columns, cheaper to compute again with some group than to keep.
        """
        groups: dict[tuple[str, ...], list[Use]] = {}
        for use in self.spec.uses_of(node):
            if use.role != "stat":
                others = tuple(dict.fromkeys(other.node for other in self._others(use)))
                groups.setdefault(others, []).append(use)
        alone = groups.pop((), [])
        if not groups:
            return {(): alone}
        next(iter(groups.values())).extend(alone)
        return groups

    def _others(self, use: Use) -> tuple[Use, ...]:
        """The uses of the same tensor's other axes."""
        return tuple(other for other in self.spec.uses_in(use.tensor) if other.axis != use.axis)

    def _share(self, node: str, others: tuple[str, ...]) -> _Share:
        versions = tuple(self.layout.version(other) for other in others)
        known = self._shares.get((node, others))
        if known is not None and known.versions == versions:
            return known
        share = self._computed(node, others, versions)
        if len(self._uses[node]) > 1:  # else it is asked for again only when it has changed
            self._shares[node, others] = share
        return share

    def _computed(self, node: str, others: tuple[str, ...], versions: tuple[int, ...]) -> _Share:
        n = self.spec.nodes[node].size
        like = {"dtype": self.networks.dtype, "device": self.networks.device}
        cross = {pair: torch.zeros(n, n, **like) for pair in self.pairs}
        rows = self._rows.get((node, others))
        moments: dict[int, list[Rows]] = {i: [] for i in self._used}
        columns = 0
        for use in self._uses[node][others]:
            units = {i: self._units(use, i) for i in self._used}
            for (i, j), total in cross.items():
                total.addmm_(units[i], units[j].T)
            if rows is None:
                for i, x in units.items():
                    moments[i].append(Rows(x.sum(1).double(), torch.linalg.vecdot(x, x).double()))
            columns += units[self._used[0]].shape[1]
        if rows is None:
            rows = {i: _total(of) for i, of in moments.items()}
        if self.layout.moves_only:
            self._rows[node, others] = rows
        return _Share(versions, cross, rows, columns)

    def _units(self, use: Use, network: int) -> Tensor:
        """(n, K): the unit's entries of one tensor, row by row."""
        tensor = self.networks[network][use.tensor].to(self.networks.dtype)
        start, stop = self.spec.span(use)
        tensor = tensor.narrow(use.axis, start, stop - start)
        for axis in range(tensor.ndim):
            uses = [other for other in self._others(use) if other.axis == axis]
            if uses:
                tensor = self.layout.arrange(tensor, axis, uses, network)
        rows = tensor.movedim(use.axis, 0)
        if use.inner:  # one block's entries, which every block has
            rows = torch.cat([rows] * self.spec.nodes[use.node].blocks)
        return rows.reshape(self.spec.nodes[use.node].size, -1)


def _total(terms: Sequence[Any]) -> Any:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
