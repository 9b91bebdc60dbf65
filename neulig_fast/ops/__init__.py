"""The fused ops, one file each."""

from ._lists_into import blend_lists_
from .blend import blend
from .blend_lists import blend_lists
from .blend_weight_grad import blend_weight_grad
from .neulig_loss import NeuLigLoss, neulig_loss
from .offset_gram import offset_gram

__all__ = [
    "NeuLigLoss",
    "blend",
    "blend_lists",
    "blend_lists_",
    "blend_weight_grad",
    "neulig_loss",
    "offset_gram",
]
