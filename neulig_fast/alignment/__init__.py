"""Experts of different origin: permutations that make them alike before a blend (MuDSC)."""

from .draft import Draft, Units
from .permutation import random_permutation
from .rules import register
from .spec import Match, Node, Spec, Use, reorder
from .specify import spec_for
from .tracer import propose
from .verifier import verify

__all__ = [
    "Draft",
    "Match",
    "Node",
    "Spec",
    "Units",
    "Use",
    "propose",
    "random_permutation",
    "register",
    "reorder",
    "spec_for",
    "verify",
]
