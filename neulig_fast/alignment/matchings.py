"""The current matching of every node: orders, or joins. What the sweeps change and weights see."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .match import match_nodes
from .similarity import Pair
from .spec import Node, Spec, Use, axis_index
from .zip import Zip, zip_in, zip_nodes, zip_out


class Matchings(ABC):
    """One matching per node, with a version that changes when it does.

    Attributes:
        pairs: (i, j) with i <= j, the pairs of networks whose similarities ``solve`` needs.
        current: by node.
        moves_only: no two units of a network are joined.
    """

    pairs: tuple[Pair, ...]
    moves_only: bool

    def __init__(self, spec: Spec, num_networks: int) -> None:
        self.spec, self.num_networks = spec, num_networks
        self.current: dict[str, Any] = {n: self.start(node) for n, node in spec.nodes.items()}
        self._versions = dict.fromkeys(spec.nodes, 0)

    @abstractmethod
    def start(self, node: Node) -> Any:
        """The matching that leaves every unit beside that of the same number."""

    @abstractmethod
    def solve(
        self, nodes: Sequence[str], similarities: Sequence[Mapping[Pair, Tensor]]
    ) -> dict[str, tuple[Any, float]]:
        """Best matchings of nodes that move together, each with its mean similarity."""

    @abstractmethod
    def arrange(self, tensor: Tensor, axis: int, uses: Sequence[Use], network: int) -> Tensor:
        """A network's tensor with one axis as the current matchings of its nodes have it."""

    @staticmethod
    @abstractmethod
    def tensor(matching: Any) -> Tensor:
        """(N, n) int64: all of a matching that matters to a network."""

    def set(self, node: str, matching: Any) -> None:
        """Take a new matching; the node's version changes only if it differs."""
        if not torch.equal(self.tensor(self.current[node]), self.tensor(matching)):
            self._versions[node] += 1
        self.current[node] = matching

    def version(self, node: str) -> int:
        """Equal while the node's matching is."""
        return self._versions[node]


class Orders(Matchings):
    """Permutations: (N, n) int64 per node, row i the order of network i; row 0 stays 0 to n - 1.

    Every network is matched to the first, whose units are in the rows of the similarity.
    """

    moves_only = True

    def __init__(self, spec: Spec, num_networks: int) -> None:
        super().__init__(spec, num_networks)
        self.pairs = tuple((0, i) for i in range(1, num_networks))

    def start(self, node: Node) -> Tensor:
        return torch.arange(node.size, device="cpu").expand(self.num_networks, -1)

    def solve(
        self, nodes: Sequence[str], similarities: Sequence[Mapping[Pair, Tensor]]
    ) -> dict[str, tuple[Tensor, float]]:
        described = [self.spec.nodes[name] for name in nodes]
        found = [match_nodes(described, [of[pair] for of in similarities]) for pair in self.pairs]
        solved = {}
        for k, node in enumerate(described):
            orders = [torch.arange(node.size, device="cpu"), *(orders[k] for orders, _ in found)]
            value = sum(values[k] for _, values in found) / max(len(found), 1)
            solved[node.name] = torch.stack(orders), value
        return solved

    def arrange(self, tensor: Tensor, axis: int, uses: Sequence[Use], network: int) -> Tensor:
        if network == 0:
            return tensor
        match = {use.node: self.current[use.node][network] for use in uses}
        index = axis_index(self.spec, match, uses, tensor.shape[axis])
        return tensor.index_select(axis, index.to(tensor.device))

    @staticmethod
    def tensor(matching: Tensor) -> Tensor:
        return matching


class Zips(Matchings):
    """Joins of the union of all networks' units: a :class:`~.zip.Zip` per node."""

    moves_only = False

    def __init__(self, spec: Spec, num_networks: int) -> None:
        super().__init__(spec, num_networks)
        self.pairs = tuple((i, j) for j in range(num_networks) for i in range(j + 1))

    def start(self, node: Node) -> Zip:
        merged = torch.arange(node.size, device="cpu").repeat(self.num_networks, 1)
        return Zip(merged, node.size, torch.empty(0, dtype=torch.float64, device="cpu"))

    def solve(
        self, nodes: Sequence[str], similarities: Sequence[Mapping[Pair, Tensor]]
    ) -> dict[str, tuple[Zip, float]]:
        described = [self.spec.nodes[name] for name in nodes]
        unions = [self._union(of) for of in similarities]
        zips = zip_nodes(described, unions, self.num_networks)
        return {name: (zipped, zipped.value) for name, zipped in zip(nodes, zips, strict=True)}

    def _union(self, similarities: Mapping[Pair, Tensor]) -> Tensor:
        rows = [
            [similarities[i, j] if i <= j else similarities[j, i].T for j in self._networks]
            for i in self._networks
        ]
        return torch.cat([torch.cat(row, 1) for row in rows])

    @property
    def _networks(self) -> range:
        return range(self.num_networks)

    def arrange(self, tensor: Tensor, axis: int, uses: Sequence[Use], network: int) -> Tensor:
        result = tensor.clone()
        for use in uses:
            start, stop = self.spec.span(use)
            piece = tensor.narrow(axis, start, stop - start).unflatten(axis, (-1, use.repeat))
            move = zip_in if use.role == "in" else zip_out
            moved = move(piece, self._of(use), network, axis).flatten(axis, axis + 1)
            result.narrow(axis, start, stop - start).copy_(moved)
        return result

    def _of(self, use: Use) -> Zip:
        zipped, node = self.current[use.node], self.spec.nodes[use.node]
        if not use.inner:
            return zipped
        inner = zipped.merged[:, : node.block_size] % node.block_size
        return Zip(inner, node.block_size, zipped.accepted)

    @staticmethod
    def tensor(matching: Zip) -> Tensor:
        return matching.merged
