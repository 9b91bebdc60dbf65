"""Whole checkpoints: merged under a ceiling of memory, checked before a byte of weights is read."""

from .merging import merge
from .report import MergeReport

__all__ = ["MergeReport", "merge"]
