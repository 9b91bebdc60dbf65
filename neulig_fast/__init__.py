"""neulig_fast: merge fine-tuned networks so that the merge performs like their ensemble."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ._backends import read_environment, show_backends, use_backend
from ._registry import NeuligFastWarning
from .alignment import Alignment, align
from .coefficients import CoefficientModule
from .encoders import expert_forward, mixture_forward
from .neulig import Head, NeuLig, Report, zero_shot_head
from .offsets import OffsetStats
from .ops import (
    BlendTelemetry,
    CrossMoments,
    MagnitudeSelect,
    NeuLigLoss,
    blend,
    blend_,
    blend_lists,
    blend_lists_,
    blend_telemetry,
    blend_weight_grad,
    cross_moments,
    expert_layer_norm,
    expert_linear,
    magnitude_histogram,
    magnitude_select,
    mixture_layer_norm,
    mixture_linear,
    neulig_loss,
    offset_gram,
)
from .pool import ExpertPool
from .tensor_lists import TensorLists

try:
    __version__ = version("neulig-fast")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+source"

_ROOT = Path(__file__).resolve().parent.parent
if not (_ROOT / "neulig_fast" / "kernels").exists() and (_ROOT / "kernels/__init__.py").exists():
    # A source tree: kernels/ stands beside the package and is mapped into it when installed.
    __path__.append(str(_ROOT))

read_environment()

__all__ = [
    "Alignment",
    "BlendTelemetry",
    "CoefficientModule",
    "CrossMoments",
    "ExpertPool",
    "Head",
    "MagnitudeSelect",
    "NeuLig",
    "NeuLigLoss",
    "NeuligFastWarning",
    "OffsetStats",
    "Report",
    "TensorLists",
    "align",
    "blend",
    "blend_",
    "blend_lists",
    "blend_lists_",
    "blend_telemetry",
    "blend_weight_grad",
    "cross_moments",
    "expert_forward",
    "expert_layer_norm",
    "expert_linear",
    "magnitude_histogram",
    "magnitude_select",
    "mixture_forward",
    "mixture_layer_norm",
    "mixture_linear",
    "neulig_loss",
    "offset_gram",
    "show_backends",
    "use_backend",
    "zero_shot_head",
]
