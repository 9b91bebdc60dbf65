"""NeuLig: a Portland that weighs frozen experts, for ensembling and for merging alike."""

from .engine import NeuLig
from .features import FeatureCache
from .heads import Head, zero_shot_head
from .history import EpochReport, History
from .portland import Portland
from .report import Report

__all__ = [
    "EpochReport",
    "FeatureCache",
    "Head",
    "History",
    "NeuLig",
    "Portland",
    "Report",
    "zero_shot_head",
]
