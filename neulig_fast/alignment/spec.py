"""Which axes of which tensors must be re-ordered together, as data (MuDSC, arXiv 2403.01753).

The neurons of a layer, its *units*, have no order of their own: re-ordering the rows of one layer
and the columns of the next leaves the function as it is. A :class:`Node` is a set of axes that must
take the same order; a :class:`Use` is one of them. Orders are index vectors, never matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import _checks

Role = Literal["out", "in", "vec", "stat"]
_ROLES = ("out", "in", "vec", "stat")

# Position k of a node holds the unit order[k] of the network as it was: (size,) int64 per node.
Match: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True)
class Node:
    """Units that move together.

    Attributes:
        name: unique in the spec.
        size: how many units.
        blocks: equal consecutive blocks (attention heads, GroupNorm's groups). More than one: a
            unit stays with the others of its block, blocks move as a whole.
        tie: nodes of one tie share the order of their blocks.
        shared_inner: every block orders its units alike (a gain that all heads share).
    """

    name: str
    size: int
    blocks: int = 1
    tie: str | None = None
    shared_inner: bool = False

    @property
    def block_size(self) -> int:
        """Units per block."""
        return self.size // self.blocks


@dataclass(frozen=True)
class Use:
    """One axis, or a part of one, that a node orders.

    Attributes:
        tensor: its key in the state dict.
        axis: of the tensor.
        node: the name of the node.
        role: ``"out"`` the axis produces the units (rows of a weight); ``"in"`` it consumes them
            (columns of the next weight); ``"vec"`` a gain or bias of the units; ``"stat"`` a
            running statistic, which moves along but says nothing of likeness.
        start: the first entry of the axis that belongs to the node (a third of a fused projection).
        repeat: consecutive entries per unit (positions of a flattened channel).
        inner: the axis has the ``block_size`` entries of one block, which all blocks share; the
            node has ``shared_inner``.
    """

    tensor: str
    axis: int
    node: str
    role: Role = "out"
    start: int = 0
    repeat: int = 1
    inner: bool = False


class Span(NamedTuple):
    """The entries ``start .. stop`` of an axis that one use covers."""

    start: int
    stop: int


class Spec:
    """Nodes and their uses: all that alignment knows of an architecture.

    Args:
        nodes: with different names.
        uses: of these nodes; no entry of an axis is in two uses.

    Raises:
        ValueError: every contradiction among them.
    """

    def __init__(self, nodes: Iterable[Node], uses: Iterable[Use]) -> None:
        nodes = list(nodes)
        self.nodes = {node.name: node for node in nodes}
        self.uses = tuple(uses)
        self.confirmed = False  # whether rules or a verified trace stand behind it: see spec_for
        _checks.raise_all("Spec", [*_node_faults(nodes), *_use_faults(self.nodes, self.uses)])

    def uses_of(self, node: str) -> tuple[Use, ...]:
        """The uses of one node, in the spec's order."""
        return tuple(use for use in self.uses if use.node == node)

    def uses_in(self, tensor: str) -> tuple[Use, ...]:
        """The uses of one tensor, of whatever node."""
        return tuple(use for use in self.uses if use.tensor == tensor)

    def span(self, use: Use) -> Span:
        """Where on its axis a use lies."""
        node = self.nodes[use.node]
        units = node.block_size if use.inner else node.size
        return Span(use.start, use.start + units * use.repeat)

    def identity(self) -> Match:
        """The order that changes nothing."""
        return {name: torch.arange(node.size, device="cpu") for name, node in self.nodes.items()}

    def __repr__(self) -> str:
        return f"Spec({len(self.nodes)} nodes, {len(self.uses)} uses)"


def _node_faults(nodes: list[Node]) -> list[str]:
    names = [node.name for node in nodes]
    found = [f"more than one node is called {name!r}" for name in _twice(names)]
    ties: dict[str, Node] = {}
    for node in nodes:
        if not _are_whole(node.size, node.blocks):
            found.append(f"node {node.name}: size and blocks must be whole numbers")
            continue
        if node.size < 1 or node.blocks < 1 or node.size % node.blocks:
            found.append(
                f"node {node.name}: {node.size} units cannot make {node.blocks} equal blocks"
            )
        first = ties.setdefault(node.tie, node) if node.tie is not None else node
        if first.blocks != node.blocks:
            found.append(
                f"node {node.name} has {node.blocks} blocks, but {first.name}, which it is tied "
                f"to ({node.tie!r}), has {first.blocks}"
            )
    return found


def _use_faults(nodes: Mapping[str, Node], uses: tuple[Use, ...]) -> list[str]:
    found: list[str] = []
    taken: dict[tuple[str, int], list[tuple[Span, str]]] = {}
    for use in uses:
        what = f"{use.tensor}, axis {use.axis}, of node {use.node}"
        node = nodes.get(use.node)
        if node is None:
            found.append(f"{what}: there is no such node{_checks.did_you_mean(use.node, nodes)}")
            continue
        if not _are_whole(node.size, node.blocks) or node.blocks < 1:
            continue  # which is said of the node
        if not _are_whole(use.axis, use.start, use.repeat):
            found.append(f"{what}: axis, start and repeat must be whole numbers")
            continue
        if use.role not in _ROLES:
            found.append(f"{what}: role must be out, in, vec or stat, got {use.role!r}")
        if use.axis < 0 or use.start < 0 or use.repeat < 1:
            found.append(
                f"{what}: axis and start must be 0 or more and repeat 1 or more, got "
                f"start {use.start}, repeat {use.repeat}"
            )
            continue
        if use.inner and not node.shared_inner:
            found.append(f"{what}: inner, but the blocks of the node do not share their order")
        units = node.block_size if use.inner else node.size
        span = Span(use.start, use.start + units * use.repeat)
        others = taken.setdefault((use.tensor, use.axis), [])
        for other, whose in others:
            if span.start < other.stop and other.start < span.stop:
                found.append(f"{what}: overlaps the use by node {whose}")
        others.append((span, use.node))
    return found


def _are_whole(*values: object) -> bool:
    return all(isinstance(value, Integral) and not isinstance(value, bool) for value in values)


def _twice(names: list[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def check_tensors(spec: Spec, tensors: Mapping[str, Tensor], subject: str) -> None:
    """ValueError listing every use that ``tensors``, a state dict, has no room for."""
    found = []
    for use in spec.uses:
        tensor = tensors.get(use.tensor)
        if tensor is None:
            advice = _checks.did_you_mean(use.tensor, tensors)
            found.append(f"node {use.node} uses {use.tensor}, which is not there{advice}")
        else:
            found += use_faults(spec, use, tensor)
    _checks.raise_all(subject, found)


def use_faults(spec: Spec, use: Use, tensor: Tensor) -> Iterator[str]:
    """That a tensor has no room for a use of it."""
    start, stop = spec.span(use)
    if use.axis >= tensor.ndim or stop > tensor.shape[use.axis]:
        yield (
            f"node {use.node} uses {use.tensor}, axis {use.axis}, entries {start} to "
            f"{stop}, but it has shape {_checks.shape(tensor)}"
        )


def check_match(spec: Spec, match: Mapping[str, Tensor], subject: str) -> None:
    """ValueError listing every node whose order is missing or is none that it may take."""
    found = [
        f"there is no node {name}{_checks.did_you_mean(name, spec.nodes)}"
        for name in match
        if name not in spec.nodes
    ]
    block_orders: dict[str, tuple[str, Tensor]] = {}
    for name, node in spec.nodes.items():
        fault = _order_fault(node, match.get(name))
        if fault is None and node.tie is not None:
            whose, order = block_orders.setdefault(node.tie, (name, block_order(node, match[name])))
            if not torch.equal(order, block_order(node, match[name])):
                fault = f"its blocks are in another order than those of {whose}, tied to it"
        if fault is not None:
            found.append(f"node {name}: {fault}")
    _checks.raise_all(subject, found)


def _order_fault(node: Node, order: Tensor | None) -> str | None:
    if order is None:
        return "has no order"
    if tuple(order.shape) != (node.size,) or order.dtype != torch.int64:
        expected = f"({node.size},) int64"
        return f"its order must be {expected}, got {_checks.shape(order)} {order.dtype}"
    if not torch.equal(order.sort().values, torch.arange(node.size, device="cpu")):
        return f"its order is no permutation of 0 to {node.size - 1}"
    rows = order.view(node.blocks, node.block_size)
    if not torch.equal(rows // node.block_size, (rows[:, :1] // node.block_size).expand_as(rows)):
        return f"its order tears one of its {node.blocks} blocks apart"
    inner = rows % node.block_size
    if node.shared_inner and not torch.equal(inner, inner[:1].expand_as(inner)):
        return "its blocks differ in the order inside, which they share"
    return None


def block_order(node: Node, order: Tensor) -> Tensor:
    """(blocks,): the block at each place."""
    return order[:: node.block_size] // node.block_size


def axis_index(spec: Spec, match: Match, uses: Iterable[Use], length: int) -> Tensor:
    """(length,): which entry of an axis goes to each place, given the axis's uses."""
    index = torch.arange(length, device="cpu")
    for use in uses:
        node, order = spec.nodes[use.node], match[use.node]
        if use.inner:
            order = order[: node.block_size] % node.block_size
        entries = order[:, None] * use.repeat + torch.arange(use.repeat, device="cpu")
        index[slice(*spec.span(use))] = use.start + entries.flatten()
    return index


def reorder(spec: Spec, match: Match, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the same function with its units in the order ``match``.

    Tensors that no node uses are the very ones given; the others are new.

    Raises:
        ValueError: a match that is none of the spec's, or tensors the spec has no place in.
    """
    check_match(spec, match, "reorder")
    check_tensors(spec, tensors, "reorder")
    used = {use.tensor for use in spec.uses}
    return {
        name: _reordered(spec, match, name, tensor) if name in used else tensor
        for name, tensor in tensors.items()
    }


def _reordered(spec: Spec, match: Match, name: str, tensor: Tensor) -> Tensor:
    for axis, length in enumerate(tensor.shape):
        uses = [use for use in spec.uses_in(name) if use.axis == axis]
        if uses:
            index = axis_index(spec, match, uses, length)
            tensor = tensor.index_select(axis, index.to(tensor.device))
    return tensor
