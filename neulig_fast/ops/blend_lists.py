"""blend_lists: weighted sums of experts' tensors, where they are.

    theta_t = sum_i w[t, i] * x[i, t]        w (T, N), or (N,) for all tensors alike

The same merge as ``blend``, of N lists of T tensors that lie anywhere in memory and may differ from
position to position in shape, dtype and alignment: no copy into an arena, and one launch for all
tensors of one dtype. Source: as ``blend`` (NeuLig, arXiv 2503.01268).

Numerics: the bits of ``blend``: terms in expert order, a multiplication and then an addition, in
fp32 (fp64 for fp64), one rounding at the end (from fp64 to a 2-byte type by way of fp32, as
``Tensor.to`` rounds).

Traffic: N * P values read once and P written once, P the number of elements of one expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _autograd, _checks
from .._list_checks import address_faults, as_lists, has_memory, list_faults
from .._registry import Op
from ..tensor_lists import TensorLists
from . import _arena, _lists, _sharded_lists
from .blend_lists_weight_grad import OP as WEIGHT_GRAD

Experts = TensorLists | Iterable[Iterable[Tensor]]


def blend_lists(
    weights: Tensor, experts: Experts, out_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Blend N lists of T tensors into one list of T tensors.

    Args:
        weights: (N,), or (T, N) with one row per position. Any float dtype.
        experts: N lists of T contiguous tensors, or :class:`neulig_fast.TensorLists` of them, which
            spares later calls the checks. Position t has one shape and dtype (fp32, bf16, fp16 or
            fp64) in every list; all tensors are on one device.
        out_dtype: of the results; None: each position's own.

    Returns:
        T tensors with the shapes of the positions, DTensors where the experts' are. Plain ones
        share one new buffer per dtype, which lives as long as one of them. Differentiable in
        ``weights``; to the experts' tensors, which may well be parameters of modules, no gradient
        flows.

    Raises:
        ValueError: shapes, dtypes, devices or layouts that do not fit, all of them listed.
    """
    if isinstance(experts, TensorLists):
        lists, found = experts.lists, []
    else:
        lists = as_lists(experts)
        found = list_faults(lists)
    found += _lists.weight_faults(weights, lists) + _out_dtype_faults(out_dtype)
    _checks.raise_all("blend_lists", found)
    if not isinstance(experts, TensorLists) and _sharded_lists.any_dtensor(lists):
        return _sharded_lists.blend_lists(blend_lists, weights, lists, out_dtype)
    refuse_transforms("blend_lists", weights, lists)
    if not by_table(weights, experts, lists):
        flat = [tensor.detach() for tensors in lists for tensor in tensors]
        return list(OP(weights, flat, out_dtype))
    prepared = experts if isinstance(experts, TensorLists) else prepare("blend_lists", lists)
    if weights.requires_grad and torch.is_grad_enabled():
        return list(_BlendTables.apply(weights, prepared, out_dtype))
    return _blended(weights, prepared, out_dtype)


def prepare(name: str, lists: tuple[tuple[Tensor, ...], ...]) -> TensorLists:
    _checks.raise_all(name, address_faults(lists))
    return TensorLists.of(lists)


def by_table(weights: Tensor, experts: Experts, *lists: Sequence[Sequence[Tensor]]) -> bool:
    """Whether addresses may be taken: not while compiling, nor of tensors without memory."""
    if torch.compiler.is_compiling():
        return False
    if isinstance(experts, TensorLists):  # whose tensors have been looked at
        return has_memory([weights]) and experts.num_tensors > 0
    flat = [tensor for some in lists for tensors in some for tensor in tensors]
    return has_memory([weights, *flat]) and len(flat) > 0


def refuse_transforms(name: str, weights: Tensor, lists: Sequence[Sequence[Tensor]]) -> None:
    """NotImplementedError where an argument belongs to forward mode or to ``torch.func``."""
    if _autograd.has_tangent(weights):
        raise NotImplementedError(f"{name}: no forward-mode derivative")
    functorch = torch._C._functorch
    if torch.compiler.is_compiling() or functorch.peek_interpreter_stack() is None:
        return
    if any(map(functorch.is_functorch_wrapped_tensor, itertools.chain([weights], *lists))):
        raise NotImplementedError(
            f"{name}: no torch.func transforms (grad, vmap, ...); use torch.autograd, and a loop "
            "over sets of weights"
        )


def _blended(
    weights: Tensor, lists: TensorLists, out_dtype: torch.dtype | None, view: Any = Tensor.view
) -> list[Tensor]:
    args = (weights.detach(), lists.flat, out_dtype)
    backend = _lists.choose(OP, weights.device, args)
    if backend == "torch":
        with torch.no_grad():  # experts may require grad; only the weights get one
            return blend_lists_reference(*args)
    return _lists.blended(backend, args[0], lists, out_dtype, view)


class _BlendTables(torch.autograd.Function):
    """The op on prepared lists, without handing hundreds of tensors to the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, lists: TensorLists, out_dtype: torch.dtype | None
    ) -> tuple[Tensor, ...]:
        # A view made in here could not be written to afterwards; one that is none to autograd can.
        results = _blended(weights, lists, out_dtype, torch.ops.aten._unsafe_view)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weights)
        ctx.lists, ctx.versions = lists, lists.versions()
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None]:
        (weights,), lists = ctx.saved_tensors, ctx.lists
        if lists.versions() != ctx.versions:
            raise RuntimeError("blend_lists: an expert was written to between forward and backward")
        args = (weights.detach(), [_lists.dense(grad) for grad in grads], lists.flat)
        if torch.is_grad_enabled():  # a second derivative, which the dispatcher's op refuses
            return WEIGHT_GRAD(*args).to(weights.dtype), None, None
        backend = _lists.choose(WEIGHT_GRAD, weights.device, args)
        if backend == "torch":
            result = WEIGHT_GRAD.reference(*args)
        else:
            result = _lists.weight_grad(backend, weights.ndim == 2, args[1], lists)
        return result.to(weights.dtype), None, None


def _out_dtype_faults(out_dtype: torch.dtype | None) -> list[str]:
    if out_dtype is None or out_dtype in _checks.FLOAT_DTYPES:
        return []
    return [f"out_dtype must be fp32, bf16, fp16 or fp64, got {out_dtype}"]


def _faults(
    weights: Tensor, experts: list[Tensor], out_dtype: torch.dtype | None = None
) -> list[str]:
    return _lists.faults(weights, experts) + _out_dtype_faults(out_dtype)


def blend_lists_reference(
    weights: Tensor, experts: list[Tensor], out_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """The formula in plain PyTorch; ``experts`` as the dispatcher has them, expert after expert."""
    results = []
    for t, tensors in enumerate(zip(*_lists.rows(experts, weights.shape[-1]), strict=True)):
        dtype = tensors[0].dtype
        w = (weights if weights.ndim == 1 else weights[t]).to(_checks.accumulation_dtype(dtype))
        total = w[0] * tensors[0].to(w.dtype)
        for i in range(1, len(tensors)):
            total = total + w[i] * tensors[i].to(w.dtype)
        results.append(total.to(out_dtype or dtype))
    return results


def blend_lists_fake(
    weights: Tensor, experts: list[Tensor], out_dtype: torch.dtype | None = None
) -> list[Tensor]:
    first = experts[: len(experts) // weights.shape[-1]]
    return [x.new_empty(x.shape, dtype=out_dtype or x.dtype) for x in first]


def _run(backend: str) -> Any:
    def run(
        weights: Tensor, experts: list[Tensor], out_dtype: torch.dtype | None = None
    ) -> list[Tensor]:
        lists = prepare("blend_lists", _lists.rows(experts, weights.shape[-1]))
        outputs = blend_lists_fake(weights, experts, out_dtype)
        _lists.write(backend, weights, _lists.targets(lists, outputs))
        return outputs

    return run


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    weights, experts, _out_dtype = inputs
    ctx.save_for_backward(weights, *experts)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    weights, *experts = ctx.saved_tensors
    op = torch.ops.neulig_fast.blend_lists_weight_grad.default
    dense = [_lists.dense(grad) for grad in grads]
    result = op(weights.detach(), dense, [x.detach() for x in experts]).to(weights.dtype)
    # torch hands over, and wants back, no argument that is equal to its default.
    return (result, [None] * len(experts), None)[: len(ctx.needs_input_grad)]


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Lists of several shapes: a scalar, nothing, odd sizes, another dtype, odd addresses."""
    draw = _arena.Draw(device, dtype, seed=23)
    double = dtype == torch.float64  # in numerical derivatives all must be
    other = _arena.Draw(device, torch.float64 if double else torch.float32, seed=24)
    shapes: tuple[tuple[int, ...], ...] = ((), (5, 3), (0, 4), (17,), (1, 129))
    yield draw.normal(3), [draw.normal(*shape) for _ in range(3) for shape in shapes], None
    yield (
        draw.normal(2, 4),
        [tensor for _ in range(4) for tensor in (draw.normal(300)[7:136], other.normal(2, 33))],
        None,
    )
    yield draw.normal(1), [draw.normal(33), draw.normal(1)], None if double else torch.bfloat16
    yield draw.normal(11), [draw.normal(70) for _ in range(11)], torch.float64


OP = Op(
    "blend_lists",
    "(Tensor weights, Tensor[] experts, ScalarType? out_dtype=None) -> Tensor[]",
    native="(Tensor weights, Tensor table, Tensor outputs, int base, int chunk, "
    "int chunks, ScalarType dtype, ScalarType out_dtype) -> ()",
    reference=blend_lists_reference,
    fake=blend_lists_fake,
    faults=_faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")},
    samples=samples,
    autograd=(_setup_context, _backward),
    differentiable=("weights",),
    elementwise=True,
)
OP.add_native("cpu", run=_run("cpu"))
OP.add_native("cuda", run=_run("cuda"), why_not=_lists.why_not_gpu)
OP.add_triton(run=_run("triton"))
