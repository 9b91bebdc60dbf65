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
            name of its tie) alone, and is never the identity where there is another.

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
    generator = _generator(seed, "inside", node.name)
    start, steps = torch.arange(node.blocks), torch.arange(node.block_size).repeat(node.blocks, 1)
    if blocks:
        start = _shuffled(node.blocks, _generator(seed, "blocks", node.tie or node.name))
    if inside:
        rows = [_shuffled(node.block_size, generator) for _ in range(node.blocks)]
        steps = torch.stack(rows[:1] * node.blocks if node.shared_inner else rows)
    return (start[:, None] * node.block_size + steps).flatten()


def _generator(seed: int, *key: str) -> torch.Generator:
    digest = hashlib.blake2b("\0".join([str(seed), *key]).encode(), digest_size=8)
    return torch.Generator().manual_seed(int.from_bytes(digest.digest(), "little", signed=True))


def _shuffled(count: int, generator: torch.Generator) -> Tensor:
    order, identity = torch.arange(count), torch.arange(count)
    while count > 1 and torch.equal(order, identity):
        order = torch.randperm(count, generator=generator)
    return order
