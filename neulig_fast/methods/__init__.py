"""Merge methods: one file for a family, one table of them all."""

from . import linear, selective, spherical, task_vectors
from ._method import BLOCK, Apply, Measure, Method, Parameter, Statistic, Task, Tile

METHODS = {
    method.name: method for method in (*linear.METHODS, *spherical.METHODS, *task_vectors.METHODS)
}

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
