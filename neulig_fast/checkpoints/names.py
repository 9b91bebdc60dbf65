"""Layers in the names of tensors: ``model.layers.12.mlp.up_proj.weight`` is of layer 12.

The first part of a name that is a number is the layer's, whatever the architecture calls its
layers; what stands before it, the *stack*, tells towers apart. No table of architectures is needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

_LAYERED = re.compile(r"(?P<stack>(?:[^.\d][^.]*\.)*)(?P<layer>\d+)(?P<rest>(?:\..*)?)")
_FIRST = ("embed", "wte", "wpe")  # in names of what runs before the layers


class Layered(NamedTuple):
    """A tensor's name in parts."""

    stack: str
    layer: int
    rest: str

    def at(self, layer: int) -> str:
        """The name of the same tensor of another layer."""
        return f"{self.stack}{layer}{self.rest}"


def split(name: str) -> Layered | None:
    """The parts of a name; None if it is of no layer."""
    found = _LAYERED.fullmatch(name)
    return Layered(found["stack"], int(found["layer"]), found["rest"]) if found else None


def layer_counts(names: Iterable[str]) -> dict[str, int]:
    """Stack -> one more than its last layer."""
    counts: dict[str, int] = {}
    for name in names:
        parts = split(name)
        if parts is not None:
            counts[parts.stack] = max(counts.get(parts.stack, 0), parts.layer + 1)
    return counts


def is_before_layers(name: str, more: Iterable[str] = ()) -> bool:
    """Whether a tensor of no layer belongs to what runs before them, such as an embedding.

    Args:
        more: parts of names that tell so too.
    """
    return any(word in name.lower() for word in (*_FIRST, *more))
