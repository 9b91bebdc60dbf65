"""How an architecture runs for N experts at once, and for one merged model per sample.

An architecture is a set of rules, one per type of module (:mod:`.rules`), written once against what
:class:`~neulig_fast.encoders.runs.Run` offers. docs/encoders.md shows how a batch flows and which
architectures there are.
"""

from . import open_clip_vit, resnet, timm_vit  # noqa: F401  (they fill the table)
from .expert_run import ExpertRun
from .forward import expert_forward, mixture_forward
from .mixture_run import MixtureRun
from .replay import Replay
from .rules import faults, register
from .runs import Run

__all__ = [
    "ExpertRun",
    "MixtureRun",
    "Replay",
    "Run",
    "expert_forward",
    "faults",
    "mixture_forward",
    "register",
]
