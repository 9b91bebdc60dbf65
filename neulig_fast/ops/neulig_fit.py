"""neulig_fit: many steps of Adam on NeuLig's Portland over cached features, in one call.

Experts and heads are frozen, so that per sample b and once for all steps, P_bi = H z_bi (its
``products``) and K_bij = <z_bi, z_bj> (its ``grams``) say all the loss needs of the head::

    w_b = softmax(W u_b + c),  v_b = Σ_i w_bi P_bi,  n_b = √(w_b' K_b w_b)      u_b = [z_b1 … z_bN]
    y_b = v_b / n_b + h            (no normalisation: y_b = v_b + h)
    q_bi = (<P_bi, ∂y_b> - (K_b w_b)_i <v_b, ∂y_b> / n_b²) / n_b                (else <P_bi, ∂y_b>)

with ∂y_b = ∂L_b/∂y_b, then the alignment term, ∂W and ∂c as in ``neulig_loss_backward``; the
losses are those of ``neulig_loss``. A step of Adam (betas 0.9 and 0.999, epsilon 1e-8, no decay)
follows each gradient. A round is one step per task, in their order (NeuLig, arXiv 2503.01268).

Cost: 4 B N² D + 4 B N C flops a step instead of 4 B N² D + 4 B D C, and B N (D + C) values read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .._checks import accumulation_dtype
from .._registry import Op
from . import _fit_arguments
from ._fit_arguments import rounds
from .neulig_loss import boosting_term
from .neulig_loss_backward import logit_gradient

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


def neulig_fit(
    state: Tensor,
    features: Sequence[Tensor],
    products: Sequence[Tensor],
    grams: Sequence[Tensor],
    biases: Sequence[Tensor],
    labels: Sequence[Tensor],
    rows: Sequence[Tensor],
    alignment: Tensor,
    step: int,
    batch: int,
    lr: float,
    scaling: float,
    centered: bool,
) -> tuple[Tensor, Tensor]:
    """R rounds of T steps, task t's r-th on its rows ``rows[t][r * batch : (r + 1) * batch]``.

    Args:
        state: (3, N·N·D + N): the Portland's weight (N, N·D) and bias, then Adam's two moments of
            them; fp32 (fp64 for fp64 features), as are products, grams, biases and alignment.
        features: (M_t, N, D) per task, one float dtype.
        products: (M_t, N, C_t), of the rows of the features.
        grams: (M_t, N, N); without any element: head t does not normalise.
        biases: (C_t,).
        labels: (M_t,) int64 for the supervised boosting term; an empty list for the entropy.
        rows: (K_t,) int64, with the same number R of batches in every task.
        alignment: (N, N), the matrix A.
        step: the number of steps done before.
        batch: rows of a step; a task's last may have fewer.

    Returns:
        The new state, and (R, T, 2): boosting and alignment term of every step, before it.

    Raises:
        ValueError: arguments that do not fit, all of them named; on the CPU also rows outside
            [0, M_t) and labels outside [0, C_t).
    """
    lists = (list(x) for x in (features, products, grams, biases, labels, rows))
    return OP(state, *lists, alignment, step, batch, float(lr), float(scaling), centered)


def neulig_fit_reference(
    state: Tensor,
    features: list[Tensor],
    products: list[Tensor],
    grams: list[Tensor],
    biases: list[Tensor],
    labels: list[Tensor],
    rows: list[Tensor],
    alignment: Tensor,
    step: int,
    batch: int,
    lr: float,
    scaling: float,
    centered: bool,
) -> tuple[Tensor, Tensor]:
    """The module's formulas, step by step."""
    state, R, T = state.clone(), rounds(rows, batch), len(features)
    terms = state.new_empty(R, T, 2)
    for r in range(R):
        for t in range(T):
            chosen = rows[t][r * batch : (r + 1) * batch]
            z, P = features[t][chosen].to(state.dtype), products[t][chosen]
            K = grams[t][chosen] if grams[t].numel() else None
            targets = labels[t][chosen] if labels else None
            gradient, terms[r, t, 0], terms[r, t, 1] = _gradient(
                state[0], z, P, K, biases[t], targets, alignment, scaling, centered
            )
            step += 1
            _adam(state, gradient, step, lr)
    return state, terms


def _gradient(
    parameters: Tensor, z: Tensor, P: Tensor, K: Tensor | None, h: Tensor,
    targets: Tensor | None, A: Tensor, scaling: float, centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of one batch's loss with respect to the parameters, and its two terms."""
    B, N, _ = z.shape
    u, (W, c) = z.flatten(1), parameters.split((parameters.numel() - N, N))
    w = torch.softmax(torch.addmm(c, u, W.view(N, -1).T), dim=1)
    v = (w.unsqueeze(1) @ P).squeeze(1)
    Kw = None if K is None else (K @ w.unsqueeze(2)).squeeze(2)
    n = 1.0 if Kw is None else (w * Kw).sum(1, keepdim=True).sqrt()
    y = v / n + h

    boosting = "entropy" if targets is None else "supervised"
    L_b = boosting_term(y, targets, boosting)
    x = w - w.mean(0) if centered else w
    L_a = ((x @ A) * x).sum(1).mean() / scaling

    dy = logit_gradient(y, targets, boosting)
    q = (P @ dy.unsqueeze(2)).squeeze(2)
    if Kw is not None:
        q = (q - Kw * (v * dy).sum(1, keepdim=True) / n**2) / n
    q = q + x @ (A + A.T) / (scaling * B)
    da = w * (q - (w * q).sum(1, keepdim=True))
    return torch.cat(((da.T @ u).flatten(), da.sum(0))), L_b, L_a


def _adam(state: Tensor, gradient: Tensor, step: int, lr: float) -> None:
    """``torch.optim.Adam`` in place, on (parameters, first moment, second moment)."""
    parameters, mean, square = state
    mean.lerp_(gradient, 1 - _BETA1)
    square.mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
    root = (square.sqrt() / (1 - _BETA2**step) ** 0.5).add_(_EPSILON)
    parameters.addcdiv_(mean, root, value=-lr / (1 - _BETA1**step))


def _fake(state, features, products, grams, biases, labels, rows, alignment,
          step, batch, lr, scaling, centered):  # fmt: skip
    return torch.empty_like(state), state.new_empty(rounds(rows, batch), len(features), 2)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple]:
    g = torch.Generator().manual_seed(5)
    acc = accumulation_dtype(dtype)

    def draw(*sizes: int, dtype: torch.dtype = acc) -> Tensor:
        return torch.randn(sizes, generator=g, dtype=torch.float64).to(device, dtype)

    # (M, C, whether the head normalises) of every task
    for tasks, N, D, batch, count, supervised, centered in (
        ([(7, 6, True), (9, 3, False)], 3, 5, 4, 2, True, False),
        ([(40, 17, True)], 2, 17, 35, 1, False, True),
        ([(5, 4, False)], 1, 3, 1, 3, True, False),
        ([(6, 1, True)], 9, 8, 3, 2, True, True),
    ):
        z = [draw(M, N, D, dtype=dtype) for M, _, _ in tasks]
        heads = [draw(C, D) for _, C, _ in tasks]
        P = [x.to(acc) @ H.T for x, H in zip(z, heads, strict=True)]
        K = [x.to(acc) @ x.to(acc).mT if n else x.new_empty(0, dtype=acc)
             for x, (_, _, n) in zip(z, tasks, strict=True)]  # fmt: skip
        labels = [torch.arange(M, device=device) % C for M, C, _ in tasks if supervised]
        short = batch - (batch > 1)  # the last batch has one row less
        rows = [torch.arange((count - 1) * batch + short, device=device) * 3 % M
                for M, _, _ in tasks]  # fmt: skip
        A, size = draw(N, N), N * N * D + N
        state = torch.stack((draw(size) / D, draw(size) / 10, draw(size).square()))
        yield (
            state, z, P, K, [draw(C) for _, C, _ in tasks], labels, rows, A @ A.T,
            5, batch, 0.1, 10.0, centered,
        )  # fmt: skip


OP = Op(
    "neulig_fit",
    "(Tensor state, Tensor[] features, Tensor[] products, Tensor[] grams, Tensor[] biases, "
    "Tensor[] labels, Tensor[] rows, Tensor alignment, int step, int batch, float lr, "
    "float scaling, bool centered) -> (Tensor, Tensor)",
    reference=neulig_fit_reference,
    fake=_fake,
    faults=_fit_arguments.faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")},
    samples=_samples,
    check=_fit_arguments.check_values,
    terms=lambda state, features, products, *_: features[0][0].numel() * len(features[0]),
    not_offered={"cuda": "not written yet"},
)
OP.add_native("cpu", why_not=_fit_arguments.why_not)
OP.add_triton(why_not=lambda _kernels, *args: _fit_arguments.why_not(*args))
