"""The fused ops, one file each."""

from .._backends import read_environment
from . import merge_task_vectors_ as _merge_task_vectors_  # noqa: F401  (defines an op)
from ._lerp import lerp_lists_
from ._lists_into import blend_lists_
from .blend import blend
from .blend_ import blend_
from .blend_lists import blend_lists
from .blend_telemetry import BlendTelemetry, blend_telemetry
from .blend_weight_grad import blend_weight_grad
from .cross_moments import CrossMoments, cross_moments
from .expert_layer_norm import expert_layer_norm
from .expert_linear import expert_linear
from .gram import gram
from .lerp_lists import lerp_lists
from .magnitude_histogram import magnitude_histogram
from .magnitude_select import MagnitudeSelect, magnitude_select
from .magnitude_sums import magnitude_sums
from .merge_task_vectors import merge_task_vectors
from .mixture_layer_norm import mixture_layer_norm
from .mixture_linear import mixture_linear
from .neulig_fit import neulig_fit
from .neulig_loss import NeuLigLoss, neulig_loss
from .offset_gram import offset_gram

__all__ = [
    "BlendTelemetry",
    "CrossMoments",
    "MagnitudeSelect",
    "NeuLigLoss",
    "blend",
    "blend_",
    "blend_lists",
    "blend_lists_",
    "blend_telemetry",
    "blend_weight_grad",
    "cross_moments",
    "expert_layer_norm",
    "expert_linear",
    "gram",
    "lerp_lists",
    "lerp_lists_",
    "merge_task_vectors",
    "magnitude_histogram",
    "magnitude_select",
    "magnitude_sums",
    "mixture_layer_norm",
    "mixture_linear",
    "neulig_fit",
    "neulig_loss",
    "offset_gram",
]

read_environment()  # which may name any of them
