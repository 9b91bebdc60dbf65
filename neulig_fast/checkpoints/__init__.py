"""Whole checkpoints: merged under a ceiling of memory, checked before a byte of weights is read."""

from .experts import emr_expert
from .merging import merge
from .report import MergeReport

__all__ = ["MergeReport", "emr_expert", "merge"]
