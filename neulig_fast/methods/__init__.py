"""Merge methods: one file for a family, one table of them all."""

from . import linear, spherical
from ._method import BLOCK, Apply, Measure, Method, Parameter, Statistic, Task, Tile

METHODS = {method.name: method for method in (*linear.METHODS, *spherical.METHODS)}

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
