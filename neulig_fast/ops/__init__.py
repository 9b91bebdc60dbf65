"""The fused ops, one file each."""

from .blend import blend
from .blend_ import blend_
from .blend_telemetry import BlendTelemetry, blend_telemetry
from .blend_weight_grad import blend_weight_grad
from .neulig_loss import NeuLigLoss, neulig_loss
from .offset_gram import offset_gram

__all__ = [
    "BlendTelemetry",
    "NeuLigLoss",
    "blend",
    "blend_",
    "blend_telemetry",
    "blend_weight_grad",
    "neulig_loss",
    "offset_gram",
]
