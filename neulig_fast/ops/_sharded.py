"""Sharded parameters: the ops on DTensors.

Every rank computes element-wise results on its own shard and talks to nobody. Only sums over
parameters (gradients with respect to weights, Gram matrices) are added across ranks, in fp64.
Every rank gets the whole of such a sum, as a plain tensor.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from .. import _checks
from .._registry import OPS
from . import _arena, _scales

if TYPE_CHECKING:
    from torch.distributed.tensor import DeviceMesh, DTensor, Placement

    from ..segments import Segments

    Bounds: TypeAlias = torch.Tensor | Sequence[int] | Segments | None

_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))


def is_dtensor(*tensors: torch.Tensor | None) -> bool:
    """Whether any is a DTensor. Plain tensors cost one comparison of types each.

    A DTensor exists only where its module is loaded, so nothing is imported to find out.
    """
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            break
    else:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tensor of the global ``shape`` lies on a mesh."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: DTensor) -> Layout:
        """The layout of ``tensor``; :meth:`wrap` gives its local part back its place."""
        return cls(tensor.device_mesh, tuple(tensor.placements), tuple(tensor.shape))

    def wrap(self, local: torch.Tensor) -> DTensor:
        """The DTensor whose shard on this rank is ``local``; differentiable, no communication."""
        from torch.distributed.tensor import DTensor

        stride = tuple(prod(self.shape[d + 1 :]) for d in range(len(self.shape)))
        return DTensor.from_local(
            local,
            self.mesh,
            self.placements,
            run_check=False,
            shape=torch.Size(self.shape),
            stride=stride,
        )

    def offset(self, dim: int) -> int:
        """Where this rank's shard starts in dimension ``dim`` of the whole tensor."""
        from torch.distributed.tensor import _utils

        _, offsets = _utils.compute_local_shape_and_global_offset(
            self.shape, self.mesh, self.placements
        )
        return int(offsets[dim])

    def replicated(self, tensor: torch.Tensor) -> torch.Tensor:
        """``tensor``, which all ranks hold alike, as a factor of this layout's elements.

        Its gradient is the whole sum on every rank, not the part of a shard.
        """
        return _Copy.apply(tensor, self._groups())

    def total(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of the shards' parts, on every rank."""
        return _Sum.apply(part, self._groups())

    @property
    def split(self) -> tuple[int, ...]:
        """The dimensions of the mesh along which ranks hold different elements."""
        return tuple(d for d, p in enumerate(self.placements) if not p.is_replicate())

    def _groups(self) -> list[Any]:
        return [self.mesh.get_group(d) for d in self.split]


def shown(placements: Sequence[Placement]) -> str:
    """Placements as messages have them."""
    return f"({', '.join(map(repr, placements))})"


class _Copy(torch.autograd.Function):
    """Identity whose gradient is summed over the groups; the transpose of :class:`_Sum`."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, groups: list[Any]) -> torch.Tensor:
        ctx.groups = groups
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Sum.apply(grad, ctx.groups), None


class _Sum(torch.autograd.Function):
    """Sum over the groups in fp64, rounded once; every rank has an equal share in the result."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, groups: list[Any]) -> torch.Tensor:
        ctx.groups = groups
        total = part.to(torch.float64, copy=True, memory_format=torch.contiguous_format)
        for group in groups:
            torch.distributed.all_reduce(total, group=group)
        return total.to(part.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Copy.apply(grad, ctx.groups), None


class _Watch(torch.autograd.Function):
    """Identity, whose backward pass has autograd check that DTensors are as they were.

    An op saves their local parts, whose versions a write to the DTensor does not change.
    """

    @staticmethod
    def forward(ctx: Any, result: torch.Tensor, *dtensors: DTensor) -> torch.Tensor:
        ctx.save_for_backward(*dtensors)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dtensors = ctx.saved_tensors
        return _Watch.apply(grad, *dtensors), *(None for _ in dtensors)


def watched(result: torch.Tensor, *inputs: torch.Tensor | None) -> torch.Tensor:
    """``result``, whose gradient is an error once a DTensor among ``inputs`` has changed."""
    return _Watch.apply(result, *(tensor for tensor in inputs if is_dtensor(tensor)))


# -- the ops over an arena -------------------------------------------------------------------------


def blend(
    weights: torch.Tensor,
    params: torch.Tensor,
    segments: Bounds,
    out_dtype: torch.dtype | None = None,
    rounding_seed: int | None = None,
    scales: torch.Tensor | None = None,
    out_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`neulig_fast.blend` of a sharded arena: (P,) or (K, P) with the columns' placements.

    Raises:
        ValueError: also for stochastic rounding of cut rows, whose bits are those of whole ones.
    """
    given = out_dtype is not None or rounding_seed is not None
    options = (out_dtype, rounding_seed) if given else ()
    layout, local, bounds = _open("blend", params, segments, *options, weights=weights)
    factors = {"scales": scales, "out_scales": out_scales}
    _checks.raise_all("blend", [f for name, s in factors.items() for f in weight_faults(s, name)])
    if rounding_seed is not None and layout.split:
        raise ValueError("blend: rounding_seed is for whole rows, and those of params are cut")
    folded = _scales.fold(whole(weights), local, whole(scales), whole(out_scales))
    rows = OPS["blend"](layout.replicated(folded), local, bounds, *options)
    rows = watched(rows, weights, params, scales, out_scales)
    return _rows(layout, rows.shape[:-1]).wrap(rows)


def blend_weight_grad(grad: torch.Tensor, params: torch.Tensor, segments: Bounds) -> torch.Tensor:
    """:func:`neulig_fast.blend_weight_grad` of shards: the whole sums, a plain tensor."""
    layout, local, bounds = _open("blend_weight_grad", params, segments, grad=grad)
    dots = OPS["blend_weight_grad"](grad.to_local(), local, bounds)
    return layout.total(watched(dots, grad, params))


def offset_gram(params: torch.Tensor, segments: Bounds) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`neulig_fast.offset_gram` of shards: the whole sums and Gram, plain tensors."""
    layout, local, bounds = _open("offset_gram", params, segments)
    sums, gram = OPS["offset_gram"](local, bounds)
    return layout.total(sums), layout.total(gram)


def _open(
    op: str, params: torch.Tensor, segments: Bounds, *options: Any, **other: torch.Tensor
) -> tuple[Layout, torch.Tensor, torch.Tensor | None]:
    """The layout of ``params``, its shard on this rank, and the segments cut to the shard.

    Looks at whole shapes only, so that all ranks raise or none does.

    Raises:
        ValueError: whatever the op says of whole tensors, and placements it cannot work on.
    """
    bounds = _arena.boundaries(op, segments, params)
    args = (*other.values(), params, bounds, *options)
    found = [*OPS[op].faults(*args), *_faults(params, **other)]
    _checks.raise_all(op, found)
    if params.device.type == "cpu":
        OPS[op].check(*args)
    layout, local = Layout.of(params), params.to_local()
    if bounds is not None:
        start = layout.offset(1)
        bounds = bounds.clamp(start, start + local.shape[1]) - start
    return layout, local, bounds


def _rows(layout: Layout, leading: Sequence[int]) -> Layout:
    """The layout of rows (*leading, P) whose columns lie as those of an arena (N, P)."""
    from torch.distributed.tensor import Shard

    columns = Shard(len(leading))
    placements = tuple(p if p.is_replicate() else columns for p in layout.placements)
    return Layout(layout.mesh, placements, (*leading, layout.shape[1]))


def whole(weights: Any) -> Any:
    """Weights that every rank has, as a plain tensor; None stays None."""
    return weights.to_local() if is_dtensor(weights) else weights


def weight_faults(weights: Any, name: str = "weights") -> Iterator[str]:
    """What keeps every rank from having the weights, or other factors of them."""
    if is_dtensor(weights) and not all(p.is_replicate() for p in weights.placements):
        yield f"{name} must be plain or Replicate, got {shown(weights.placements)}"


def _faults(
    params: torch.Tensor, weights: torch.Tensor | None = None, grad: torch.Tensor | None = None
) -> Iterator[str]:
    if not is_dtensor(params):
        yield "params must be a DTensor like the other argument, got a plain tensor"
        return
    layout = Layout.of(params)
    if not all(p.is_replicate() or p.is_shard(1) for p in layout.placements):
        yield (
            "a DTensor's params must be Replicate or Shard(1), which cuts columns, on every mesh "
            f"dimension, got {shown(layout.placements)}; redistribute them first"
        )
    elif layout.mesh.get_coordinate() is None:
        yield "params lie on a mesh that this rank is not part of"
    if weights is not None:
        yield from weight_faults(weights)
    if grad is not None:
        expected = _rows(layout, grad.shape[:-1])
        if not is_dtensor(grad) or Layout.of(grad) != expected:
            got = shown(grad.placements) if is_dtensor(grad) else "a plain tensor"
            yield (
                "grad must be a DTensor on the mesh of params with its columns where theirs are, "
                f"{shown(expected.placements)}; got {got}"
            )
