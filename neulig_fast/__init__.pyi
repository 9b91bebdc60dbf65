from . import alignment, encoders, methods, neulig, ops, testing
from ._backends import show_backends, use_backend
from ._registry import NeuligFastWarning
from .alignment import Alignment, align
from .averages import AveragedModel, ema_multi_avg_fn, swa_multi_avg_fn
from .checkpoints import MergeReport, emr_expert, merge
from .coefficients import CoefficientModule
from .compat import Patch, patch
from .encoders import expert_forward, mixture_forward
from .merged_linear import MergedLinear
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
    lerp_lists,
    lerp_lists_,
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
    "AveragedModel",
    "BlendTelemetry",
    "CoefficientModule",
    "CrossMoments",
    "ExpertPool",
    "Head",
    "MagnitudeSelect",
    "MergeReport",
    "MergedLinear",
    "NeuLig",
    "NeuLigLoss",
    "NeuligFastWarning",
    "OffsetStats",
    "Patch",
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
    "ema_multi_avg_fn",
    "emr_expert",
    "encoders",
    "expert_forward",
    "expert_layer_norm",
    "expert_linear",
    "gram",
    "lerp_lists",
    "lerp_lists_",
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
    "patch",
    "show_backends",
    "swa_multi_avg_fn",
    "testing",
    "use_backend",
    "zero_shot_head",
]
