"""Units followed through a module that has no rule, along the graph torch.fx makes of it.

Modules inside that have a rule are followed by it; of the rest, what is understood is in the tables
below, and anything else is an error that names the node of the graph. A reshape to heads is not
understood. What comes out is a proposal: ``alignment.verify`` judges it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..encoders.rules import join, kind
from .builders.attention import multihead
from .builders.layers import flattened
from .draft import Draft, Units
from .rules import ADVICE, rule_of, where
from .spec import Spec, check_tensors


def propose(model: nn.Module) -> Spec:
    """The specification that a trace of ``model`` suggests, whether or not its type has a rule.

    Raises:
        ValueError: it cannot be traced, or something in it is not understood.
    """
    draft = Draft(traced)
    draft.fix(traced(draft, model, "", draft.given()))
    spec = draft.spec()
    check_tensors(spec, model.state_dict(), "propose")
    return spec


def traced(draft: Draft, module: nn.Module, path: str, x: Units) -> Any:
    """What ``module`` makes of ``x``: units, or a structure of them."""
    values: dict[fx.Node, Any] = {}
    graph = _graph(module, path)
    given = next((node for node in graph.nodes if node.op == "placeholder"), None)
    for node in graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.op == "output":
            return args[0]
        if node.op == "placeholder":
            values[node] = x if node is given else (args[0] if args else draft.given())
            continue
        step = _Step(draft, module, path, node)
        try:
            values[node] = _OPERATIONS[node.op](step, args, kwargs)
        except _NotUnderstoodError as reason:
            raise ValueError(
                f"spec_for: {where(path)} is a {kind(module)}, which has no rule, and its trace is "
                f"not understood at {node.format_node()}: {reason}. {ADVICE}"
            ) from None
    return None


class _NotUnderstoodError(Exception):
    """A node of the graph that no table covers."""


class _Step(NamedTuple):
    draft: Draft
    module: nn.Module
    path: str
    node: fx.Node


@dataclass(frozen=True)
class _Weights:
    """A parameter or buffer on its way through the graph."""

    module: nn.Module
    path: str
    name: str

    @property
    def shape(self) -> torch.Size:
        return getattr(self.module, self.name).shape


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return rule_of(m) is not None or super().is_leaf_module(m, module_qualified_name)


def _graph(module: nn.Module, path: str) -> fx.Graph:
    try:
        return _Tracer().trace(module)
    except (TypeError, ValueError, RuntimeError, AttributeError, AssertionError) as error:
        raise ValueError(
            f"spec_for: {where(path)} is a {kind(module)}, which has no rule, and torch.fx cannot "
            f"trace it ({error}). {ADVICE}"
        ) from error


# -- the nodes of a graph -------------------------------------------------------------------------


def _call_module(step: _Step, args: tuple, kwargs: dict) -> Any:
    module = step.module.get_submodule(step.node.target)
    path = join(step.path, step.node.target)
    if rule_of(module) is None:
        raise _NotUnderstoodError(f"{path} is a {kind(module)}, which has no rule")
    units = [value for value in (*args, *kwargs.values()) if isinstance(value, Units)]
    if type(module) is nn.MultiheadAttention and len(units) == 3 and units[1] == units[2]:
        return multihead(step.draft, module, path, units[0], units[1]), None
    if len(units) != 1:
        raise _NotUnderstoodError(f"{path} takes {len(units)} activations, its rule one")
    return step.draft.apply(module, path, units[0])


def _get_attr(step: _Step, args: tuple, kwargs: dict) -> Any:
    parent, _, name = step.node.target.rpartition(".")
    owner = step.module.get_submodule(parent)
    if not isinstance(getattr(owner, name), Tensor):
        raise _NotUnderstoodError("it is no tensor")
    return _Weights(owner, join(step.path, parent) if parent else step.path, name)


def _call(step: _Step, args: tuple, kwargs: dict) -> Any:
    target = step.node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    for names, follow in _CALLS:
        if name in names:
            return follow(step, *args, **kwargs)
    for names, follow in _CALLS_OF_UNITS:
        if name in names:
            if not args or not isinstance(args[0], Units):
                raise _NotUnderstoodError(f"{name} of anything but an activation")
            return follow(step, *args, **kwargs)
    raise _NotUnderstoodError(f"{name} is not in the tables of what is")


_OPERATIONS: dict[str, Callable[[_Step, tuple, dict], Any]] = {
    "call_module": _call_module,
    "get_attr": _get_attr,
    "call_function": _call,
    "call_method": _call,
}


# -- calls ----------------------------------------------------------------------------------------


def _element_wise(step: _Step, *args: Any, **kwargs: Any) -> Any:
    """Activations, sums and products: what meets is joined; a parameter runs along."""
    values = [*args, *kwargs.values()]
    units = [value for value in values if isinstance(value, Units)]
    weights = [value for value in values if isinstance(value, _Weights)]
    if not units:
        if len(weights) > 1:
            raise _NotUnderstoodError("parameters meet one another before they meet units")
        return weights[0] if weights else None
    result = units[0]
    for other in units[1:]:
        result = step.draft.join(result, other)
    for one in weights:
        _runs_along(step, one, result)
    return result


def _runs_along(step: _Step, weights: _Weights, x: Units) -> None:
    shape = weights.shape
    if all(length == 1 for length in shape):
        return
    if x.layout == "channels":
        axes = [k for k, length in enumerate(shape) if length == x.size and len(shape) - k > 1]
    else:
        axes = [len(shape) - 1] if shape[-1] > 1 else []
    if len(axes) != 1:
        raise _NotUnderstoodError(f"which axis of {weights.name} {tuple(shape)} has the channels")
    step.draft.use("vec", x, weights.module, weights.path, **{weights.name: axes[0]})


def _pooled(step: _Step, x: Any, *args: Any, **kwargs: Any) -> Any:
    if x.layout != "channels":
        raise _NotUnderstoodError(f"pooling of units that lie {x.layout!r}")
    return x


def _reduced(step: _Step, x: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """A mean or maximum over positions."""
    dims = set(dim) if isinstance(dim, tuple | list) else {dim}
    if x.layout == "channels" and dims in ({2, 3}, {-1, -2}):
        return x if keepdim else x.at("last")
    if x.layout == "last" and dims == {1}:
        return x
    raise _NotUnderstoodError(f"over dimensions {dim} of units that lie {x.layout!r}")


def _flattened(step: _Step, x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    if (start_dim, end_dim) == (1, -1):
        return flattened(x)
    if (start_dim, end_dim) == (2, -1) and x.layout == "channels":
        return x
    raise _NotUnderstoodError(f"start_dim={start_dim}, end_dim={end_dim}")


def _reshaped(step: _Step, x: Any, *shape: Any) -> Any:
    """view(B, -1), with B an activation's length: what flattens."""
    (shape,) = shape if len(shape) == 1 and isinstance(shape[0], tuple | list) else (shape,)
    if len(shape) == 2 and shape[0] is None and shape[1] == -1:
        return flattened(x)
    raise _NotUnderstoodError("a reshape to anything but (B, -1)")


def _transposed(step: _Step, x: Any, *dims: int) -> Any:
    if dims in ((1, 2), (2, 1), (0, 2, 1)) and x.layout in ("channels", "last"):
        return x.at("last" if x.layout == "channels" else "channels")
    raise _NotUnderstoodError(f"dimensions {dims} of units that lie {x.layout!r}")


def _linear(step: _Step, x: Any, weight: Any, bias: Any = None) -> Any:
    """F.linear(x, W, b) of parameters."""
    return _product(step, x, weight, bias, made=0)


def _matmul(step: _Step, x: Any, weight: Any) -> Any:
    """x @ W of a parameter."""
    return _product(step, x, weight, None, made=1)


def _product(step: _Step, x: Any, weight: Any, bias: Any, made: int) -> Any:
    if not isinstance(weight, _Weights) or len(weight.shape) != 2:
        raise _NotUnderstoodError("a product of anything but units and a parameter (a, b)")
    step.draft.expect(x, step.path, "last", "repeated", "tiled")
    step.draft.use("in", x, weight.module, weight.path, **{weight.name: 1 - made})
    out = step.draft.units(join(weight.path, weight.name), weight.shape[made])
    step.draft.use("out", out, weight.module, weight.path, **{weight.name: made})
    if isinstance(bias, _Weights):
        step.draft.use("vec", out, bias.module, bias.path, **{bias.name: 0})
    return out


def _picked(step: _Step, x: Any, index: Any) -> Any:
    """A token, or tokens, of (B, T, C); an entry of a tuple; a length of a shape."""
    if x is None or isinstance(x, tuple | list):
        return None if x is None else x[index]
    whole = isinstance(index, tuple) and len(index) == 2 and index[0] == slice(None)
    if not isinstance(x, Units) or not whole or x.layout != "last":
        raise _NotUnderstoodError("an index that is no token of (B, T, C)")
    return x


def _length(step: _Step, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A length, which no table looks into."""
    return None


def _attribute(step: _Step, x: Any, name: str) -> Any:
    """A shape or a type, which no table looks into; a transpose is no such thing."""
    if name not in ("shape", "ndim", "dtype", "device"):
        raise _NotUnderstoodError(f"attribute {name} of an activation")
    return None


# fmt: off
_ELEMENT_WISE = {
    "relu", "relu6", "gelu", "silu", "elu", "selu", "celu", "leaky_relu", "sigmoid", "tanh",
    "softplus", "mish", "hardswish", "hardsigmoid", "hardtanh", "logsigmoid", "softsign",
    "dropout", "dropout1d", "dropout2d", "alpha_dropout", "contiguous", "clone", "float", "double",
    "add", "iadd", "sub", "isub", "mul", "imul", "truediv", "div", "neg", "pow", "abs", "exp",
    "log", "sqrt", "rsqrt", "square", "reciprocal", "erf", "clamp", "maximum", "minimum", "where",
    "relu_", "sigmoid_", "tanh_", "clamp_", "add_", "sub_", "mul_", "div_",
}
# fmt: on
_CALLS: list[tuple[set[str], Callable[..., Any]]] = [
    (_ELEMENT_WISE, _element_wise),
    ({"getitem"}, _picked),
    ({"getattr"}, _attribute),
    ({"size", "dim"}, _length),
]
_CALLS_OF_UNITS: list[tuple[set[str], Callable[..., Any]]] = [
    (
        {f"{kind}_pool{d}d" for kind in ("max", "avg") for d in (1, 2, 3)}
        | {f"adaptive_{kind}_pool{d}d" for kind in ("max", "avg") for d in (1, 2, 3)},
        _pooled,
    ),
    ({"mean", "sum", "amax"}, _reduced),
    ({"flatten"}, _flattened),
    ({"view", "reshape"}, _reshaped),
    ({"transpose", "permute"}, _transposed),
    ({"linear"}, _linear),
    ({"matmul"}, _matmul),
]
