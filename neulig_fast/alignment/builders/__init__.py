"""One file per family of architectures: the rules of the modules it is made of."""

from . import attention, layers, open_clip, resnet, timm_vit  # noqa: F401  (they fill the table)
