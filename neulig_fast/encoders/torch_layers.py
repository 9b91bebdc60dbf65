"""Rules of ``torch.nn``: linear layers, convolutions, norms, and what has no parameters."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .. import _checks
from .convolution import Geometry
from .rules import join, kind, register, where
from .runs import Run

_ACTIVATIONS = {
    "torch.nn.modules.activation.ReLU": "relu",
    "open_clip.transformer.QuickGELU": "quick_gelu",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.GELUTanh": "gelu_tanh",
    "timm.layers.activations.QuickGELU": "quick_gelu",
}
# fmt: off
_OTHER_ACTIVATIONS = (
    "CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU",
    "LogSigmoid", "Mish", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softshrink", "Softsign",
    "Tanh", "Tanhshrink", "Threshold",
)
# fmt: on
_WITHOUT_PARAMETERS = [
    *_ACTIVATIONS,
    *(f"torch.nn.modules.activation.{name}" for name in _OTHER_ACTIVATIONS),
    *(
        f"torch.nn.modules.pooling.{name}{dimensions}d"
        for name in ("MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool")
        for dimensions in (1, 2)
    ),
]
_NOTHING_IN_EVAL_MODE = [
    "torch.nn.modules.linear.Identity",
    *(f"torch.nn.modules.dropout.Dropout{dimensions}" for dimensions in ("", "1d", "2d")),
    "torch.nn.modules.dropout.AlphaDropout",
    "open_clip.transformer.PatchDropout",
    "timm.layers.drop.DropPath",
    "timm.layers.patch_dropout.PatchDropout",
]


# -- one after the other --------------------------------------------------------------------------


@register("torch.nn.modules.container.Sequential")
def sequential(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    # Not named_children(), which leaves out a module that is there for the second time.
    return chain(run, module, path, module._modules, x)


def chain(run: Run, module: Any, path: str, names: Iterable[str], x: Tensor) -> Tensor:
    """Submodules one after the other; an activation behind a linear layer is made part of it."""
    waiting = deque(names)
    while waiting:
        name = waiting.popleft()
        member = module.get_submodule(name)
        activation = None
        if waiting and type(member) is nn.Linear:
            activation = activation_of(module.get_submodule(waiting[0]))
        if activation is None:
            x = run.child(module, path, name, x)
        else:
            waiting.popleft()
            x = linear(run, member, join(path, name), x, activation)
    return x


def activation_of(module: nn.Module) -> str | None:
    """The activation that a linear layer can end with, if the module is one."""
    if kind(module) == "torch.nn.modules.activation.GELU":
        return {"none": "gelu", "tanh": "gelu_tanh"}[module.approximate]
    return _ACTIVATIONS.get(kind(module))


# -- with parameters ------------------------------------------------------------------------------


@register(
    "torch.nn.modules.linear.Linear", "torch.nn.modules.linear.NonDynamicallyQuantizableLinear"
)
def linear(run: Run, module: Any, path: str, x: Tensor, activation: str | None = None) -> Tensor:
    width = module.in_features
    _check(path, x, x.ndim >= 2 and x.shape[-1] == width, f"(B, ..., {width})")
    weight, bias = run.stacks(module, path, "weight", "bias")
    return run.linear(x, weight, bias, activation)


def _renormalises(module: Any) -> str | None:
    return None if module.max_norm is None else f"max_norm={module.max_norm} changes the table"


@register("torch.nn.modules.sparse.Embedding", why_not=_renormalises)
def embedding(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    return run.embedding(x, *run.stacks(module, path, "weight"))


@register("torch.nn.modules.conv.Conv2d")
def conv2d(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    channels, padding = module.in_channels, module.padding
    _check(path, x, x.ndim == 4 and x.shape[1] == channels, f"(B, {channels}, H, W)")
    if isinstance(padding, str) or module.padding_mode != "zeros":
        # As the module itself does: torch's convolution knows equal padding with zeros alone.
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        amounts = (0,) * 4 if padding == "valid" else module._reversed_padding_repeated_twice
        x, padding = F.pad(x, tuple(amounts), mode), (0, 0)
    geometry = Geometry(module.stride, padding, module.dilation, module.groups)
    if not geometry.fits(x.shape[-2:], module.kernel_size):
        pixels, kernel = (" x ".join(map(str, n)) for n in (x.shape[-2:], module.kernel_size))
        raise ValueError(
            f"{where(path)}: images of {pixels} pixels do not hold a kernel of {kernel}"
        )
    weight, bias = run.stacks(module, path, "weight", "bias")
    return run.conv2d(x, weight, bias, geometry)


def _check(path: str, x: Tensor, fits: bool, form: str) -> None:
    """ValueError for inputs that do not fit, or that no layer with parameters takes.

    Parameters would be broadcast to some of them without a word.
    """
    if not fits:
        raise ValueError(f"{where(path)}: inputs must be {form}, got {_checks.shape(x)}")
    if not x.is_floating_point():
        raise ValueError(f"{where(path)}: inputs must be floating point, got {x.dtype}")


def _without_statistics(module: Any) -> str | None:
    if module.running_mean is None:
        return "track_running_stats=False: an image's features would depend on the others"
    return None


@register(
    "torch.nn.modules.batchnorm.BatchNorm1d",
    "torch.nn.modules.batchnorm.BatchNorm2d",
    why_not=_without_statistics,
)
def batch_norm(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    channels, flat = module.num_features, type(module) is nn.BatchNorm1d
    form = f"(B, {channels}) or (B, {channels}, L)" if flat else f"(B, {channels}, H, W)"
    _check(path, x, x.ndim in ((2, 3) if flat else (4,)) and x.shape[1] == channels, form)
    names = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, variance = run.stacks(module, path, *names)
    return run.batch_norm(x, weight, bias, mean, variance, module.eps)


def _several_dimensions(module: Any) -> str | None:
    if len(module.normalized_shape) == 1:
        return None
    return f"normalized_shape={module.normalized_shape} has several dimensions"


LAYER_NORMS = (
    "torch.nn.modules.normalization.LayerNorm",
    "open_clip.transformer.LayerNorm",
    "open_clip.transformer.LayerNormFp32",
    "timm.layers.norm.LayerNorm",
    "timm.layers.norm.LayerNormFp32",
)


@register(*LAYER_NORMS, why_not=_several_dimensions)
def layer_norm(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    return norm_of_sum(run, module, path, x, None)[0]


def norm_of_sum(
    run: Run, module: Any, path: str, x: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(y, s): ``module``, at ``path``, on s = x + residual. In one operation for a layer norm."""
    if kind(module) in LAYER_NORMS and module.weight is not None:
        weight, bias = run.stacks(module, path, "weight", "bias")
        return run.layer_norm(x, weight, bias, module.eps, residual)
    s = x if residual is None else x + residual
    if kind(module) in LAYER_NORMS:
        return F.layer_norm(s, module.normalized_shape, None, None, module.eps), s
    return run.apply(module, path, s), s


# -- without parameters ---------------------------------------------------------------------------


def _several_results(module: Any) -> str | None:
    return "return_indices=True" if getattr(module, "return_indices", False) else None


@register(*_WITHOUT_PARAMETERS, why_not=_several_results)
def as_it_is(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    if getattr(module, "inplace", False):
        # x may be the caller's images, or be needed again by a rule that does not expect that.
        module = copy.copy(module)
        module.inplace = False
    return module(x)


@register(*_NOTHING_IN_EVAL_MODE)
def nothing(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    return x


def _mixes_rows(module: Any) -> str | None:
    return None if module.start_dim == 1 else f"start_dim={module.start_dim}"


@register("torch.nn.modules.flatten.Flatten", why_not=_mixes_rows)
def flatten(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    return module(x)
