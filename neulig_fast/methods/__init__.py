"""Merge methods: one file for a family, one table of them all."""

from . import linear, selective, spherical, task_vectors
from ._method import BLOCK, Apply, Measure, Method, Parameter, Statistic, Task, Tile

_FAMILIES = (linear, task_vectors, spherical, selective)
METHODS = {method.name: method for family in _FAMILIES for method in family.METHODS}

__all__ = [
    "BLOCK",
    "METHODS",
    "Apply",
    "Measure",
    "Method",
    "Parameter",
    "Statistic",
    "Task",
    "Tile",
]
