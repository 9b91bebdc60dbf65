"""``torch.optim.swa_utils``: averages of models in training, in one pass over all tensors."""

from __future__ import annotations

from collections.abc import Callable

from packaging.specifiers import SpecifierSet
from torch import nn
from torch.optim import swa_utils

from .. import averages
from ..ops._sharded import is_dtensor
from ._seam import Host, Seam, Unsupported

_WHERE = "torch.optim.swa_utils"


def get_ema_multi_avg_fn(decay: float = 0.999) -> Callable[..., None]:
    """The exponential average in fp32 arithmetic, rounded once."""
    if not isinstance(decay, (int, float)) or not 0 <= decay <= 1:
        raise Unsupported("a decay that is no number from 0 to 1")
    return averages.ema_multi_avg_fn(decay)


def get_swa_multi_avg_fn() -> Callable[..., None]:
    """The average of all models so far, likewise."""
    return averages.swa_multi_avg_fn()


def update_parameters(self: swa_utils.AveragedModel, model: nn.Module) -> None:
    """A step that does not read the number of models from the device."""
    averages.update_parameters(self, model)


def update_parameters_exactly(self: swa_utils.AveragedModel, model: nn.Module) -> None:
    """The same, through the functions that torch would call."""
    if self.avg_fn is None and self.multi_avg_fn is None:
        raise Unsupported("no averaging function was given")
    if is_dtensor(*model.parameters()):
        raise Unsupported("DTensors")
    averages.update_parameters(self, model)


HOST = Host(
    "torch_swa",
    "torch",
    SpecifierSet(">=2.11,<2.12"),
    lambda: (
        # Whether torch's kernels fuse a multiplication and an addition depends on the processor.
        Seam(f"{_WHERE}:get_ema_multi_avg_fn", None, get_ema_multi_avg_fn),
        Seam(f"{_WHERE}:get_swa_multi_avg_fn", None, get_swa_multi_avg_fn),
        Seam(
            f"{_WHERE}:AveragedModel.update_parameters",
            update_parameters_exactly,
            update_parameters,
        ),
    ),
)
