"""Experts of different origin: permutations that make them alike before a blend (MuDSC)."""

from .spec import Match, Node, Spec, Use, reorder

__all__ = ["Match", "Node", "Spec", "Use", "reorder"]
