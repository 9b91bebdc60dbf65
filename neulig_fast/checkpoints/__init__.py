"""Whole checkpoints: merged under a ceiling of memory, checked before a byte of weights is read."""

from .merging import MergeReport, merge

__all__ = ["MergeReport", "merge"]
