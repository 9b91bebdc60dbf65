"""Learnable merging coefficients: a module that runs its experts' blend and learns its weights.

    theta(lambda)[p] = sum_i w[row(p), i] * theta_i[p],    w = weights of the coefficients lambda

This is the inner loop of AdaMerging (arXiv 2310.02575) and of other methods that learn how much of
each expert goes into each layer. docs/coefficients.md counts its passes over the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import _checks
from .encoders.template import call, evaluating
from .pool import ExpertPool

Granularity = Literal["model", "layer", "tensor"]
Constraint = Literal["none", "clamp", "softmax"]

GRANULARITIES = ("model", "layer", "tensor")
CONSTRAINTS = ("none", "clamp", "softmax")
ADAMERGING_INIT = 0.3  # the task-arithmetic scale that AdaMerging starts from


class CoefficientModule(nn.Module):
    """The pool's template with blended parameters; its only parameter is :attr:`coefficients`.

    Every call blends one new row of the arena and runs the template, in eval mode, on views of it;
    no graph of additions per tensor exists. Nothing is cast: inputs must fit the pool's dtype and
    device. Not for concurrent threads, as the modes of the template's submodules are set meanwhile.

    Float buffers (BatchNorm statistics) take the mean weights of the rows that their layer's
    parameters use, of all rows where the layer has none, and pass no gradient on; with one row for
    the whole model that is the same blend. Integer buffers are expert 0's.

    Args:
        pool: N experts and the template that runs them.
        granularity: one row of coefficients for the ``"model"``, per ``"layer"``
            (:meth:`Segments.layers`) or per ``"tensor"``, counting parameters only.
        init: the coefficients to start from: a number, or a tensor of their shape or of one row's.
            Default 0.3 with ``base``; else 0 for softmax and 1 / N otherwise: the uniform average.
        constraint: ``"none"``: coefficients are used as they are. ``"clamp"``: clamped to [0, 1]
            as in AdaMerging, but one that is outside still gets a gradient whose descent leads
            back; under ``torch.clamp`` it would stay there for good. ``"softmax"``: softmax of
            each row, so that the blend weights are positive and sum to one.
        base: the expert that is the pre-trained model, if there is one. Coefficients then are
            scales of the K = N - 1 others' task vectors, in the pool's order without ``base``:
            theta_base + sum_k lambda_k (theta_k - theta_base), that is weights lambda_k and
            1 - sum_k lambda_k for ``base``. Without it K = N and coefficients are blend weights.

    Attributes:
        coefficients: (K,), or (R, K) with one row per entry of ``rows``; fp32 (fp64 for fp64).
        rows: names of the layers or tensors that the rows stand for; ``("model",)`` for one.

    Raises:
        TypeError: ``pool`` is not an :class:`ExpertPool`.
        ValueError: a pool without template or parameters, unknown words, a ``base`` that is no
            expert or goes with softmax, an unfit ``init``; all of them listed.
    """

    def __init__(
        self,
        pool: ExpertPool,
        granularity: Granularity = "model",
        init: float | Tensor | None = None,
        constraint: Constraint = "none",
        base: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(pool, ExpertPool):
            got = type(pool).__name__
            raise TypeError(f"CoefficientModule: pool must be an ExpertPool, got {got}")
        _checks.raise_all("CoefficientModule", _faults(pool, granularity, constraint, base))
        self.pool, self.granularity, self.constraint = pool, granularity, constraint
        self.base = base
        self.rows = self._lay_out_rows()
        count = pool.num_experts - (base is not None)
        shape = (count,) if granularity == "model" else (len(self.rows), count)
        if init is None:
            uniform = 0.0 if constraint == "softmax" else 1 / count
            init = uniform if base is None else ADAMERGING_INIT
        start = _start(init, _checks.accumulation_dtype(pool.params.dtype))
        if start is None:
            got = f"init must be a number or a dense tensor of real numbers, got {init!r}"
            raise ValueError(f"CoefficientModule: {got}")
        _checks.raise_all("CoefficientModule", _init_faults(start, shape, constraint))
        self.coefficients = nn.Parameter(start.to(pool.params.device).expand(shape).clone())

    def _lay_out_rows(self) -> tuple[str, ...]:
        """Names of the rows; registers which row each parameter and each float buffer takes."""
        if self.granularity == "model":
            return ("model",)
        segments = self.pool.segments
        layers, count = segments.layers(), len(segments.parameters())
        labels = layers if self.granularity == "layer" else list(segments.names)
        rows = tuple(dict.fromkeys(labels[:count]))
        number = {label: row for row, label in enumerate(rows)}
        row_of = [number[label] for label in labels[:count]]
        of_layer: dict[str, set[int]] = {}
        for layer, row in zip(layers, row_of, strict=False):
            of_layer.setdefault(layer, set()).add(row)
        shares = torch.zeros(len(segments) - count, len(rows), device="cpu")
        for share, layer in zip(shares, layers[count:], strict=True):
            members = sorted(of_layer.get(layer, range(len(rows))))
            share[members] = 1 / len(members)
        device = self.pool.params.device
        self.register_buffer("_row_of", torch.tensor(row_of, device=device), persistent=False)
        self.register_buffer("_shares", shares.to(device), persistent=False)
        return rows

    def weights(self) -> Tensor:
        """The blend weights, (N,) or (S, N) for the S tensors of the pool; differentiable.

        ``pool.blend(module.weights())`` is the merged state dict that a gradient flows through.
        """
        values = self.coefficients
        if self.constraint == "clamp":
            values = _Clamp.apply(values)
        elif self.constraint == "softmax":
            values = values.softmax(-1)
        if self.base is not None:
            rest = 1 - values.sum(-1, keepdim=True)
            values = torch.cat((values[..., : self.base], rest, values[..., self.base :]), -1)
        if self.granularity == "model":
            return values
        # Not a matrix product, which TF32 and autocast would round.
        of_buffers = (self._shares[..., None].to(values.dtype) * values).sum(1)
        return torch.cat((values[self._row_of], of_buffers))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the merged model makes of the arguments."""
        state = self.pool.blend(self.weights())
        for segment in self.pool.segments:
            if segment.kind == "buffer":
                state[segment.name] = state[segment.name].detach()
        template = self.pool.template
        with evaluating(template):
            return call(template, state, *args, **kwargs)

    @torch.no_grad()
    def merged_state_dict(self) -> dict[str, Tensor]:
        """The merged model's state dict at the present coefficients: views of one new row."""
        return self.pool.blend(self.weights())

    def extra_repr(self) -> str:
        base = "" if self.base is None else f", base={self.base}"
        shape = _checks.shape(self.coefficients)
        return f"{self.granularity}, coefficients {shape}, constraint={self.constraint!r}{base}"


class _Clamp(torch.autograd.Function):
    """Clamp to [0, 1]. Outside, only a gradient whose descent leads back inside passes."""

    @staticmethod
    def forward(values: Tensor) -> Tensor:
        return values.clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (values,) = ctx.saved_tensors
        outward = ((values < 0) & (grad > 0)) | ((values > 1) & (grad < 0))
        return grad.masked_fill(outward, 0)


def _faults(pool: ExpertPool, granularity: Any, constraint: Any, base: Any) -> Iterator[str]:
    if pool.template is None:
        yield "the pool has no template module to run; give ExpertPool a template="
    if not pool.num_parameter_columns:
        yield "the pool holds no parameters, only buffers"
    for name, word, known in (
        ("granularity", granularity, GRANULARITIES),
        ("constraint", constraint, CONSTRAINTS),
    ):
        if word not in known:
            hint = _checks.did_you_mean(str(word), known)
            yield f"{name} must be one of {', '.join(known)}; got {word!r}{hint}"
    if base is None:
        return
    n = pool.num_experts
    if not isinstance(base, int) or isinstance(base, bool) or not 0 <= base < n:
        yield f"base must be None or an expert 0 .. {n - 1}, got {base!r}"
    if n < 2:
        yield "base needs at least one other expert in the pool"
    if constraint == "softmax":
        yield "softmax makes the coefficients sum to 1, which leaves base no weight; drop one"


def _start(init: Any, dtype: torch.dtype) -> Tensor | None:
    """``init`` in the type of the coefficients; None for what no tensor can be made of."""
    if isinstance(init, Tensor):
        readable = init.layout == torch.strided and not (init.is_complex() or init.is_meta)
        return init.detach().to(dtype) if readable else None
    if isinstance(init, bool) or not isinstance(init, (int, float)):
        return None
    try:
        return torch.tensor(float(init), dtype=dtype, device="cpu")
    except OverflowError:  # an integer beyond fp64, which is not finite in `dtype` either
        return torch.tensor(torch.inf, dtype=dtype, device="cpu")


def _init_faults(start: Tensor, shape: tuple[int, ...], constraint: str) -> Iterator[str]:
    if tuple(start.shape) not in ((), shape[-1:], shape):
        one_row = f" or {shape[-1:]}" if len(shape) > 1 else ""
        yield f"init must be a number or of shape {shape}{one_row}, got {_checks.shape(start)}"
    if not start.isfinite().all():
        yield f"init must be finite in {start.dtype}"
    elif constraint == "clamp" and not ((start >= 0) & (start <= 1)).all():
        yield "init must lie in [0, 1] with constraint='clamp'"
