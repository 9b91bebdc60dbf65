"""Random orders that a specification allows, and models in them."""

from __future__ import annotations

import copy
import hashlib
from typing import TypeVar

import torch
from torch import Tensor, nn

from .spec import Match, Node, Spec, reorder

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def random_permutation(model: AnyModule, spec: Spec, seed: int) -> tuple[AnyModule, Match]:
    """``model`` with its units in another order, which computes the same.

    Args:
        model: left as it is.
        spec: of its architecture.
        seed: a node's order depends on it and on the node's name (for the order of blocks, the
            name of its tie) alone, and is never the identity where there is another; nor is the
            order of its blocks.

    Returns:
        (a deep copy, the match that it was re-ordered by).

    Raises:
        ValueError: the spec is none of the model's.
    """
    match = {name: random_order(node, seed) for name, node in spec.nodes.items()}
    permuted = copy.deepcopy(model)
    permuted.load_state_dict(reorder(spec, match, model.state_dict()))
    return permuted, match


def random_order(node: Node, seed: int, blocks: bool = True, inside: bool = True) -> Tensor:
    """(size,) int64: an order that the node may take; of its blocks and inside them, or of one."""
    places = torch.arange(max(node.blocks, node.block_size), device="cpu")
    start, steps = places[: node.blocks], places[None, : node.block_size]
    if blocks:
        start = _shuffled(1, node.blocks, _generator(seed, "blocks", node.tie or node.name))[0]
    if inside:
        rows = 1 if node.shared_inner else node.blocks
        steps = _shuffled(rows, node.block_size, _generator(seed, "inside", node.name))
    return (start[:, None] * node.block_size + steps).flatten()


def _generator(seed: int, *key: str) -> torch.Generator:
    digest = hashlib.blake2b("\0".join([str(seed), *key]).encode(), digest_size=8)
    return torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little", signed=True))


def _shuffled(rows: int, count: int, generator: torch.Generator) -> Tensor:
    """(rows, count): orders, not all of them the identity."""
    orders = identity = torch.arange(count, device="cpu").repeat(rows, 1)
    while count > 1 and torch.equal(orders, identity):
        draws = [torch.randperm(count, generator=generator, device="cpu") for _ in range(rows)]
        orders = torch.stack(draws)
    return orders
