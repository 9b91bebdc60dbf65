"""NeuLig's training loss for one batch of cached features.

For sample b with expert features z_bi (i = 1..N), u_b = [z_b1 … z_bN] and frozen head (H, h)::

    a_b = W u_b + c,  w_b = softmax(a_b)                        the CoopVec
    e_b = Σ_i w_bi z_bi,  y_b = H e_b/‖e_b‖ + h                 (no division unless normalize)
    boosting    supervised  L_b = -(1/B) Σ_b log softmax(y_b)[t_b]
                entropy     L_b = -(1/B) Σ_b Σ_c p_bc log(p_bc + 1e-6),  p = softmax(y)
    alignment   L_a = (1/(λB)) Σ_b v_b' A v_b,  v_b = w_b       (centered: w_b - mean_b w_b)
    loss = L_b + L_a

features (B, N, D); portland_weight (N, N·D); portland_bias (N,); head_weight (C, D); head_bias
(C,) or None; targets (B,) int64, or None for entropy; alignment (N, N), the matrix A (s s' in the
paper). Any float dtypes; everything is computed and returned in fp32, in fp64 for fp64 features.
NeuLig (arXiv 2503.01268); docs/neulig.md, 3 and 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import FLOAT_DTYPES, accumulation_dtype, check_tensors, layout_faults, shape
from .._registry import Op
from .neulig_loss_backward import ENTROPY_EPSILON, ensemble_logits, for_cpu, why_not_cpu

BOOSTING = ("supervised", "entropy")
_NO_TARGET = torch.iinfo(torch.int64).min


class NeuLigLoss(NamedTuple):
    """Scalars ``loss`` = ``boosting`` + ``alignment``, and the ``coopvec`` (B, N) of the batch."""

    loss: Tensor
    boosting: Tensor
    alignment: Tensor
    coopvec: Tensor


def neulig_loss(
    features: Tensor,
    portland_weight: Tensor,
    portland_bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    targets: Tensor | None,
    alignment: Tensor,
    *,
    boosting: str = "supervised",
    scaling: float = 100.0,
    normalize: bool = True,
    centered: bool = False,
) -> NeuLigLoss:
    """The loss above; differentiable with respect to every float tensor, once.

    Raises:
        TypeError: what is no tensor.
        ValueError: shapes, dtypes or settings that do not fit, all of them named; on the CPU also
            targets outside [0, C).
    """
    named = {
        "features": features, "portland_weight": portland_weight, "portland_bias": portland_bias,
        "head_weight": head_weight, "alignment": alignment,
    }  # fmt: skip
    optional = {"head_bias": head_bias, "targets": targets}
    named |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    check_tensors("neulig_loss", **named)
    tensors = (features, portland_weight, portland_bias, head_weight, head_bias, targets, alignment)
    return NeuLigLoss(*OP(*tensors, boosting, float(scaling), normalize, centered))


def _faults(z, W, c, H, h, t, A, boosting: str, scaling: float, *_flags: bool) -> Iterator[str]:
    if z.ndim != 3 or H.ndim != 2 or 0 in z.shape or 0 in H.shape:
        yield (
            "features must be (B, N, D) and head_weight (C, D), with no size zero, "
            f"got {shape(z)} and {shape(H)}"
        )
        return
    (B, N, D), C = z.shape, H.shape[0]
    expected = (
        ("portland_weight", "(N, N*D)", W, (N, N * D)),
        ("portland_bias", "(N,)", c, (N,)),
        ("head_weight", "(C, D)", H, (C, D)),
        ("head_bias", "(C,)", h, (C,)),
        ("targets", "(B,)", t, (B,)),
        ("alignment", "(N, N)", A, (N, N)),
    )
    for name, words, tensor, wanted in expected:
        if tensor is None:
            continue
        yield from layout_faults(name, tensor)
        if tensor.shape != wanted:
            yield f"{name} must be {words} = {wanted}, got {shape(tensor)}"
        if name != "targets" and tensor.dtype not in FLOAT_DTYPES:
            yield f"{name} must be a float tensor, got {tensor.dtype}"
        if tensor.device != z.device:
            yield f"{name} must be on {z.device} like features, got {tensor.device}"
    yield from layout_faults("features", z)
    if z.dtype not in FLOAT_DTYPES:
        yield f"features must be a float tensor, got {z.dtype}"
    if boosting not in BOOSTING:
        yield f"boosting must be one of {', '.join(BOOSTING)}, got {boosting!r}"
    if t is None and boosting == "supervised":
        yield "targets are needed for boosting='supervised'"
    if t is not None and t.dtype != torch.int64:
        yield f"targets must be int64, got {t.dtype}"
    if not scaling > 0:
        yield f"scaling must be positive, got {scaling}"


def _check_targets(*args: Any) -> None:
    """The values of ``targets``: an error that names them instead of a read out of bounds."""
    targets, classes = args[5], args[3].shape[0]
    if targets is None or args[7] != "supervised":
        return
    low, high = torch.aminmax(targets)
    if low < 0 or high >= classes:
        wrong = targets[(targets < 0) | (targets >= classes)].unique().tolist()
        raise ValueError(f"neulig_loss: targets must be in [0, {classes}), got {wrong[:8]}")


def boosting_term(y: Tensor, targets: Tensor | None, boosting: str) -> Tensor:
    """L_b of logits (B, C)."""
    if boosting == "supervised":
        # ignore_index is put out of the way: on a GPU a target of -100 must not pass as ignored.
        return torch.nn.functional.cross_entropy(y, targets, ignore_index=_NO_TARGET)
    p = torch.softmax(y, dim=1)
    return -(p * (p + ENTROPY_EPSILON).log()).sum(1).mean()


def neulig_loss_reference(
    features: Tensor,
    portland_weight: Tensor,
    portland_bias: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    targets: Tensor | None,
    alignment: Tensor,
    boosting: str,
    scaling: float,
    normalize: bool,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The module's formula, in the paper's notation."""
    acc = accumulation_dtype(features.dtype)
    z, W, c, H, A = (
        t.to(acc) for t in (features, portland_weight, portland_bias, head_weight, alignment)
    )
    h = None if head_bias is None else head_bias.to(acc)

    w = torch.softmax(torch.addmm(c, z.flatten(1), W.T), dim=1)
    _, _, y = ensemble_logits(w, z, H, h, normalize)
    L_b = boosting_term(y, targets, boosting)
    v = w - w.mean(0) if centered else w
    L_a = ((v @ A) * v).sum(1).mean() / scaling
    return L_b + L_a, L_b, L_a, w


def _fake(features, portland_weight, portland_bias, head_weight, head_bias, targets, alignment,
          boosting, scaling, normalize, centered):  # fmt: skip
    B, N, _ = features.shape
    acc = accumulation_dtype(features.dtype)
    scalars = [features.new_empty((), dtype=acc) for _ in range(3)]
    return (*scalars, features.new_empty((B, N), dtype=acc))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[3], *inputs[:7])
    ctx.settings = inputs[7:]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    w, *inputs = ctx.saved_tensors
    z, W, _c, H, h, t, A = inputs
    needs = [ctx.needs_input_grad[k] for k in (0, 1, 2, 3, 4, 6)]
    gradients = torch.ops.neulig_fast.neulig_loss_backward.default(
        *grads, w, z, W, H, h, t, A, *ctx.settings, needs
    )
    by_input = dict(zip((0, 1, 2, 3, 4, 6), gradients, strict=True))
    return (
        tuple(
            by_input[k].to(x.dtype) if ctx.needs_input_grad[k] else None
            for k, x in enumerate(inputs)
        )
        + (None,) * 4
    )


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple]:
    g = torch.Generator().manual_seed(3)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=g, dtype=torch.float64).to(device, dtype)

    for B, N, D, C, boosting, normalize, centered in (
        (4, 3, 5, 6, "supervised", True, False),
        (17, 5, 9, 10, "entropy", True, False),
        (7, 2, 17, 3, "supervised", False, True),
        (3, 4, 8, 1, "supervised", True, True),
        (1, 1, 3, 4, "entropy", False, False),
    ):
        z = draw(B, N, 2 * D)[..., ::2] if B == 7 else draw(B, N, D)  # once with strides
        t = torch.arange(B, device=device) % C if boosting == "supervised" else None
        h = draw(C) if N % 2 else None
        A = draw(N, N)
        yield (
            z, draw(N, N * D) / D, draw(N), draw(C, D), h, t, A @ A.T,
            boosting, 10.0, normalize, centered,
        )  # fmt: skip


def _prepare(*args: Any) -> tuple[Any, ...]:
    z, W, c, H, h, t, A = args[:7]
    H, W, c, h, t, A = for_cpu(z, H, W, c, h, t, A)
    return (z, W, c, H, h, t, A, *args[7:])


OP = Op(
    "neulig_loss",
    "(Tensor features, Tensor portland_weight, Tensor portland_bias, Tensor head_weight, "
    "Tensor? head_bias, Tensor? targets, Tensor alignment, str boosting, float scaling, "
    "bool normalize, bool centered) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=neulig_loss_reference,
    fake=_fake,
    faults=_faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")},
    samples=_samples,
    check=_check_targets,
    autograd=(_setup_context, _backward),
    differentiable=("features", "portland_weight", "portland_bias", "head_weight", "head_bias",
                    "alignment"),
    terms=lambda *args: args[0].shape[1] * args[0].shape[2],
    not_offered={"cuda": "not written yet"},
)  # fmt: skip
OP.add_triton(why_not=lambda kernels, z, W, c, H, *_: kernels.why_not(z, W, H))
OP.add_native("cpu", prepare=_prepare, why_not=lambda *args: why_not_cpu(args[0], args[3]))
