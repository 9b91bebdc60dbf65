from . import alignment, encoders, methods, neulig, ops, testing
from ._backends import show_backends, use_backend
from ._registry import NeuligFastWarning
from .alignment import Alignment, align
from .checkpoints import MergeReport, merge
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
    gram,
    magnitude_histogram,
    magnitude_select,
    magnitude_sums,
    merge_task_vectors,
    mixture_layer_norm,
    mixture_linear,
    neulig_loss,
    offset_gram,
)
from .pool import ExpertPool
from .tensor_lists import TensorLists

__version__: str

__all__ = [
    "Alignment",
    "BlendTelemetry",
    "CoefficientModule",
    "CrossMoments",
    "ExpertPool",
    "Head",
    "MagnitudeSelect",
    "MergeReport",
    "NeuLig",
    "NeuLigLoss",
    "NeuligFastWarning",
    "OffsetStats",
    "Report",
    "TensorLists",
    "align",
    "alignment",
    "blend",
    "blend_",
    "blend_lists",
    "blend_lists_",
    "blend_telemetry",
    "blend_weight_grad",
    "cross_moments",
    "encoders",
    "expert_forward",
    "expert_layer_norm",
    "expert_linear",
    "gram",
    "magnitude_histogram",
    "magnitude_select",
    "magnitude_sums",
    "merge",
    "merge_task_vectors",
    "methods",
    "mixture_forward",
    "mixture_layer_norm",
    "mixture_linear",
    "neulig",
    "neulig_loss",
    "offset_gram",
    "ops",
    "show_backends",
    "testing",
    "use_backend",
    "zero_shot_head",
]
