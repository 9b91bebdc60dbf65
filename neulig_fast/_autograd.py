"""What autograd sees of an op: its formula, an explicit error, or a write and no gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch.autograd import forward_ad

Formula = tuple[Callable[..., None], Callable[..., Any]]  # setup_context, backward


def register(op: Any, library: torch.library.Library, formula: Formula | None) -> None:
    """Register ``formula`` for an op of the registry; without one, asking for it is an error."""
    if op.writes:
        for key in ("Autograd", "ADInplaceOrView"):  # inference mode skips the first
            library.impl(op.name, lambda *args: _write(op, *args), key)
        return
    setup_context, backward = formula or _not_differentiable(op.name)
    torch.library.register_autograd(
        f"neulig_fast::{op.name}",
        _without_autocast(backward),
        setup_context=setup_context,
        lib=library,
    )


def _without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Formulas state their own types, as ops do."""

    def run(ctx: Any, *grads: Any) -> Any:
        # A list of results has a list of gradients.
        each = chain.from_iterable(g if isinstance(g, list | tuple) else [g] for g in grads)
        device = next(grad for grad in each if grad is not None).device.type
        if not torch.is_autocast_enabled(device):
            return backward(ctx, *grads)
        with torch.autocast(device, enabled=False):
            return backward(ctx, *grads)

    return run


def _not_differentiable(name: str) -> Formula:
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        return None

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name}: not differentiable; detach its inputs")

    return setup_context, backward


def _write(op: Any, *args: Any) -> None:
    """An op that writes into its first argument: no gradient, and a new version of that tensor."""
    refuse_gradients(op.name, op.arguments, args)
    if args[0].is_neg():  # below, the dispatcher would replace it by a copy
        raise ValueError(f"{op.name}: {op.arguments[0]} is a negated view, as Tensor.is_neg() says")
    with torch._C._AutoDispatchBelowADInplaceOrView():
        op.overload(*args)
    if not args[0].is_inference():
        torch.autograd.graph.increment_version(args[0])


def refuse_gradients(op: str, names: Iterable[str], arguments: Iterable[Any]) -> None:
    """RuntimeError where autograd would have to record an op that writes."""
    if not torch.is_grad_enabled():
        return
    for name, argument in zip(names, arguments, strict=False):
        if _asks_for_gradient(argument):
            raise RuntimeError(
                f"{op}: not differentiable, but {name} requires grad; detach it or call under "
                "torch.no_grad()"
            )


def _asks_for_gradient(argument: Any) -> bool:
    """Whether a tensor, or the tensor it is a view of, requires grad."""
    if not isinstance(argument, torch.Tensor):
        return False
    return argument.requires_grad or (argument._base is not None and argument._base.requires_grad)


def has_tangent(argument: Any) -> bool:
    """Whether an argument carries a forward-mode tangent."""
    return (
        forward_ad._current_level >= 0
        and isinstance(argument, torch.Tensor)
        and forward_ad.unpack_dual(argument).tangent is not None
    )
