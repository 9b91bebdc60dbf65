"""The fused ops, one file each."""

from .blend import blend
from .blend_weight_grad import blend_weight_grad
from .offset_gram import offset_gram

__all__ = ["blend", "blend_weight_grad", "offset_gram"]
