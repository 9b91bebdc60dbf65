"""One-to-one matching of nodes: units inside blocks, blocks as a whole, ties between nodes.

A node of g blocks of m units may order its blocks, and the units inside each. For the block pair
(a, b) let V[a, b] be the value of the best order inside it; the blocks' order maximises the sum of
V[a, blocks[a]]. Nodes of one tie share the blocks' order, so their V are added first: the heads of
query-key and of value-output must move together (MuDSC, arXiv 2403.01753, with the ties that its
code leaves out).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .assignment import assign, assign_many, in_float64, similarity_faults
from .spec import Node, Spec


class _Grouped(NamedTuple):
    """A choice for every node of a tie, and the mean similarity of the nodes, summed."""

    blocks: Tensor  # (g,): the block at each place
    inner: list[Tensor]  # per node (g, g, m): the order inside of every block pair
    value: float


def match_nodes(
    nodes: Sequence[Node], similarities: Sequence[Tensor]
) -> tuple[list[Tensor], list[float]]:
    """The orders of the nodes of one tie, or of one node, that are most like network 1.

    Exact when no node has ``shared_inner``. With it, one order inside serves all blocks, and the
    two choices depend on each other: each is made in turn, exactly, while the value rises, from
    the best order inside of every block pair; the best end is kept. Every step is exact, the end
    may be a local optimum.

    Args:
        nodes: one node, or several of the same tie.
        similarities: per node (size, size), any float dtype: the units of network 1 as rows, those
            of network i as columns. Computed in fp64. More networks are matched one by one, each
            to the first.

    Returns:
        ``(orders, values)``: per node (size,) int64, position k holds the unit to stand beside
        unit k of network 1; and the mean similarity of its pairs.

    Raises:
        TypeError: a similarity that is no tensor.
        ValueError: nodes that are not of one tie, similarities that do not fit them, are NaN or
            infinite.
    """
    check_nodes("match_nodes", nodes, similarities, networks=1)
    tiles = [_tiles(node, in_float64(s)) for node, s in zip(nodes, similarities, strict=True)]
    own = [_own_orders(tile) for tile in tiles]
    shared = [node.shared_inner for node in nodes]
    if any(shared):
        pairs = [divmod(pair, nodes[0].blocks) for pair in range(nodes[0].blocks ** 2)]
        ends = (_alternate(tiles, own, shared, a, b) for a, b in pairs)
        found = max(ends, key=lambda end: end.value)
    else:
        found = _order_blocks(tiles, own)
    place = torch.arange(len(found.blocks), device="cpu")
    orders, values = [], []
    for node, tile, inner in zip(nodes, tiles, found.inner, strict=True):
        order = found.blocks[:, None] * node.block_size + inner[place, found.blocks]
        orders.append(order.flatten())
        values.append(float(_values(tile, inner)[place, found.blocks].mean()))
    return orders, values


def check_nodes(
    subject: str, nodes: Sequence[Node], similarities: Sequence[Tensor], networks: int
) -> None:
    """Raise unless nodes and similarities over the units of ``networks`` networks fit."""
    if not nodes or len(nodes) != len(similarities):
        raise ValueError(
            f"{subject}: must be one similarity per node, got {len(nodes)} nodes and "
            f"{len(similarities)} similarities"
        )
    ties = {node.tie for node in nodes}
    if len(nodes) > 1 and (len(ties) > 1 or None in ties):
        listed = ", ".join(f"{node.name} (tie {node.tie!r})" for node in nodes)
        raise ValueError(f"{subject}: several nodes must be of one tie, got {listed}")
    Spec(nodes, ())  # it refuses blocks that do not fit
    named = {f"similarity of node {n.name}": s for n, s in zip(nodes, similarities, strict=True)}
    _checks.check_tensors(subject, **named)
    found: list[str] = []
    for node, (name, similarity) in zip(nodes, named.items(), strict=True):
        found += similarity_faults(name, similarity, node.size * networks)
    _checks.raise_all(subject, found)


def _tiles(node: Node, similarity: Tensor) -> Tensor:
    """(g, g, m, m): the similarity of every block pair."""
    sides = (node.blocks, node.block_size)
    return similarity.reshape(*sides, *sides).transpose(1, 2)


def _own_orders(tiles: Tensor) -> Tensor:
    """(g, g, m): the best order inside of every block pair on its own."""
    orders, _ = assign_many(tiles.flatten(0, 1))
    return orders.view(tiles.shape[:3])


def _values(tiles: Tensor, inner: Tensor) -> Tensor:
    """(g, g): the mean similarity of every block pair's matched units."""
    return tiles.gather(-1, inner.unsqueeze(-1)).squeeze(-1).mean(-1)


def _order_blocks(tiles: list[Tensor], inner: list[Tensor]) -> _Grouped:
    """The best order of the blocks, the orders inside given."""
    each = [_values(tile, order) for tile, order in zip(tiles, inner, strict=True)]
    blocks, value = assign(torch.stack(each).sum(0))
    return _Grouped(blocks, inner, value)


def _alternate(
    tiles: list[Tensor], own: list[Tensor], shared: list[bool], a: int, b: int
) -> _Grouped:
    """Improve both choices in turn, from the order inside that suits block b beside block a."""
    place = torch.arange(len(tiles[0]), device="cpu")
    inner = [
        free[a, b].expand_as(free) if one else free for free, one in zip(own, shared, strict=True)
    ]
    best = _order_blocks(tiles, inner)
    while True:
        inner = [
            assign(tile[place, best.blocks].sum(0))[0].expand_as(free) if one else free
            for tile, free, one in zip(tiles, own, shared, strict=True)
        ]
        following = _order_blocks(tiles, inner)
        if following.value <= best.value:
            return best
        best = following
