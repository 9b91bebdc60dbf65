"""Merge methods: one file for a family, one table of them all."""

from . import (
    balance,
    della,
    fisher,
    fusion,
    linear,
    selective,
    sharing,
    spherical,
    task_vectors,
    trajectory,
)
from ._method import BLOCK, Apply, Aside, Measure, Method, Parameter, Statistic, Task, Tile

_FAMILIES = (
    *(linear, trajectory, fisher, task_vectors, della, sharing, balance),
    *(spherical, selective, fusion),
)
METHODS = {method.name: method for family in _FAMILIES for method in family.METHODS}

__all__ = [
    "BLOCK",
    "METHODS",
    "Apply",
    "Aside",
    "Measure",
    "Method",
    "Parameter",
    "Statistic",
    "Task",
    "Tile",
]
