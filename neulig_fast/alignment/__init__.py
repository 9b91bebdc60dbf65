"""Experts of different origin: permutations that make them alike before a blend (MuDSC)."""

from .aligner import Aligner, align
from .draft import Draft, Units
from .likeness import EnsembleLikeness
from .permutation import random_permutation
from .repair import reestimate_batchnorm, rescale
from .result import Alignment
from .rules import register
from .spec import Match, Node, Spec, Use, reorder
from .specify import spec_for
from .tracer import propose
from .verifier import verify
from .zip import Zip

__all__ = [
    "Aligner",
    "Alignment",
    "Draft",
    "EnsembleLikeness",
    "Match",
    "Node",
    "Spec",
    "Units",
    "Use",
    "Zip",
    "align",
    "propose",
    "random_permutation",
    "reestimate_batchnorm",
    "register",
    "reorder",
    "rescale",
    "spec_for",
    "verify",
]
