"""neulig_fit on Triton: two launches a step, nothing between them but the order of the stream.

    samples      per sample: CoopVec, loss and the pull of the boosting term on each expert's weight
    parameters   per columns of u: ∂W = Σ_b ∂a_b u_b' over the whole batch, and Adam on them

A column's sum over the batch is one program's, samples in order: no partial sums, no atomics, the
same bits on every run. Every program of the second launch makes ∂a of w and of its pull anew, which
is a few values per sample and saves a launch; there, too, the mean CoopVec is known. Launches find
their batch by counters in memory, so that a round is the same launches every time: on a GPU it is
recorded as a graph and replayed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ._launch import REGISTERS, Config, Launch, config, repeat, require, tl, triton
from ._launch import missing as missing_on
from ._portland import PRECISION, coopvecs, mean_row, softmax_gradient, steer
from ._products import boosting_term, gram_product

BETA1, BETA2, EPSILON = tl.constexpr(0.9), tl.constexpr(0.999), tl.constexpr(1e-8)
ROWS, COLUMNS = 32, 32  # samples and columns of the second launch at once


@triton.jit(do_not_specialize=["M", "K", "batch"])
def neulig_fit_samples_kernel(
    state_ptr, features_ptr, products_ptr, grams_ptr, biases_ptr, labels_ptr, rows_ptr,
    alignment_ptr, counters_ptr, coopvec_ptr, pull_ptr, steered_ptr, loss_ptr,
    M, K, batch, C, D: tl.constexpr, N: tl.constexpr, EXPERTS: tl.constexpr,
    SAMPLES: tl.constexpr, COLUMNS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """w, the boosting term's pull on it, (A + A') w and the loss of SAMPLES rows of a batch.

    state (3, N * N * D + N), the parameters in front; of the task: features (M, N, D), products
    (M, N, C), grams (M, N, N) or None, biases (C,), labels (M,) or None, rows (K,); alignment
    (N, N); counters (2,) int64, the number of rounds before this one, which is handed on from the
    first to the second; coopvec, pull and steered (batch, N), loss (batch,). Contiguous, floats in
    the type of the state, features in any. A row that is not there, or a label, makes NaN.
    Reads N (D + C + N) values per sample from memory, N * N * D per program from cache.
    """
    ACC: tl.constexpr = state_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    done = tl.load(counters_ptr)
    if program == 0:
        tl.store(counters_ptr + 1, done)
    place = program * SAMPLES + tl.arange(0, SAMPLES)
    used = (place < batch) & (done * batch + place < K)
    row = tl.load(rows_ptr + done * batch + place, mask=used, other=-1)
    real = (row >= 0) & (row < M)
    count = tl.minimum(batch, K - done * batch).to(ACC)

    bias_ptr = state_ptr + N * N * D
    w = coopvecs(features_ptr + row * N * D, real, state_ptr, bias_ptr, N * D, ACC, N, EXPERTS,
                 SAMPLES, COLUMNS)  # fmt: skip
    w = tl.where(real[:, None], w, float("nan"))
    n = tl.full((SAMPLES,), 1.0, ACC)
    if grams_ptr is not None:
        Kw = gram_product(grams_ptr, row, real, w, N, EXPERTS)
        n = tl.sqrt(tl.sum(w * Kw, 1))
    label = tl.zeros((SAMPLES,), tl.int64)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row, mask=real, other=-1)
    loss, pull, radial = boosting_term(
        products_ptr, row, real, w, n, biases_ptr, label, C, count, labels_ptr is not None,
        N, EXPERTS, SAMPLES, CLASSES,
    )  # fmt: skip
    if grams_ptr is not None:
        pull = (pull - Kw * (radial / (n * n))[:, None]) / n[:, None]

    i = tl.arange(0, EXPERTS)[None, :]
    inside = used[:, None] & (i < N)
    places = place[:, None] * N + i
    tl.store(coopvec_ptr + places, w, mask=inside)
    tl.store(pull_ptr + places, pull, mask=inside)
    tl.store(steered_ptr + places, steer(w, alignment_ptr, ACC, N, EXPERTS), mask=inside)
    tl.store(loss_ptr + place, loss, mask=used)


@triton.jit
def adam(state_ptr, place, mask, size, gradient, rates_ptr, step):
    """A step of Adam on the parameters at ``place``; see the op for the constants."""
    rate = tl.load(rates_ptr + 2 * step)
    correction = tl.load(rates_ptr + 2 * step + 1)
    mean = tl.load(state_ptr + size + place, mask=mask, other=0.0)
    square = tl.load(state_ptr + 2 * size + place, mask=mask, other=0.0)
    mean += (gradient - mean) * (1 - BETA1)
    square = square * BETA2 + gradient * gradient * (1 - BETA2)
    root = tl.sqrt(square) / correction + EPSILON
    parameter = tl.load(state_ptr + place, mask=mask, other=0.0)
    tl.store(state_ptr + place, parameter - rate * (mean / root), mask=mask)
    tl.store(state_ptr + size + place, mean, mask=mask)
    tl.store(state_ptr + 2 * size + place, square, mask=mask)


@triton.jit(do_not_specialize=["M", "K", "batch", "T", "task"])
def neulig_fit_parameters_kernel(
    state_ptr, features_ptr, rows_ptr, counters_ptr, coopvec_ptr, pull_ptr, steered_ptr, loss_ptr,
    rates_ptr, terms_ptr, M, K, batch, T, task, D: tl.constexpr, N: tl.constexpr,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCALING: tl.constexpr,
    CENTERED: tl.constexpr,
):  # fmt: skip
    """∂W = Σ_b ∂a_b u_b' for COLUMNS columns of u, which end with a column of ones for c, and Adam.

    Arguments as of the first launch; rates (R * T, 2): of every step, Adam's rate and the root of
    its second correction; terms (R, T, 2). The last task's first program counts the round.
    Reads COLUMNS features and a few values per sample; reads and writes 3 N COLUMNS of the state.
    """
    ACC: tl.constexpr = state_ptr.dtype.element_ty
    INPUTS: tl.constexpr = N * D
    program = tl.program_id(0).to(tl.int64)
    done = tl.load(counters_ptr + 1)
    count = tl.minimum(batch, K - done * batch)
    mean = tl.zeros((1, EXPERTS), ACC)
    steered_mean = tl.zeros((1, EXPERTS), ACC)
    if CENTERED:
        mean += mean_row(coopvec_ptr, count, N, EXPERTS, ROWS)
        steered_mean += mean_row(steered_ptr, count, N, EXPERTS, ROWS)

    i = tl.arange(0, EXPERTS)
    column = program * COLUMNS + tl.arange(0, COLUMNS)
    gradient = tl.zeros((EXPERTS, COLUMNS), ACC)
    boosting = tl.zeros((ROWS,), ACC)
    alignment = tl.zeros((ROWS,), ACC)
    first = count * 0
    while first < count:
        b = first + tl.arange(0, ROWS)
        used = b < count
        inside = used[:, None] & (i < N)[None, :]
        places = b[:, None] * N + i[None, :]
        w = tl.load(coopvec_ptr + places, mask=inside, other=0.0)
        steered = tl.load(steered_ptr + places, mask=inside, other=0.0) - steered_mean
        pull = tl.load(pull_ptr + places, mask=inside, other=0.0)
        boosting += tl.load(loss_ptr + b, mask=used, other=0.0)
        alignment += tl.sum(tl.where(inside, (w - mean) * steered, 0.0), 1)
        da = softmax_gradient(w, pull + steered / (SCALING * count.to(ACC)))
        row = tl.load(rows_ptr + done * batch + b, mask=used, other=-1)
        real = ((row >= 0) & (row < M))[:, None] & (column < INPUTS)[None, :]
        place = row[:, None] * INPUTS + column[None, :]
        u = tl.load(features_ptr + place, mask=real, other=0.0).to(ACC)
        u = tl.where((column == INPUTS)[None, :], 1.0, u)
        gradient = tl.dot(tl.trans(da), u, gradient, input_precision=PRECISION, out_dtype=ACC)
        first += ROWS

    # Row i of the weight, and the bias behind the last one.
    place = tl.where(
        (column < INPUTS)[None, :], i[:, None] * INPUTS + column[None, :], N * INPUTS + i[:, None]
    )
    mask = (i < N)[:, None] & (column <= INPUTS)[None, :]
    step = done * T + task
    adam(state_ptr, place, mask, N * INPUTS + N, gradient, rates_ptr, step)
    if program == 0:
        tl.store(terms_ptr + 2 * step, tl.sum(boosting, 0) / count.to(ACC))
        tl.store(terms_ptr + 2 * step + 1, tl.sum(alignment, 0) / (2 * SCALING * count.to(ACC)))
        if task == T - 1:
            tl.store(counters_ptr, done + 1)


def round_launches(
    state: torch.Tensor,
    lists: Sequence[Sequence[torch.Tensor]],
    alignment: torch.Tensor,
    scratch: tuple[torch.Tensor, ...],
    terms: torch.Tensor,
    batch: int,
    scaling: float,
    centered: bool,
    launch: Config,
) -> list[Launch]:
    """What :func:`neulig_fit` launches for a round: two launches per task.

    ``lists``: features, products, grams, biases, labels and rows; ``scratch``: see :func:`scratch`.
    """
    features, products, grams, biases, labels, rows = lists
    counters, rates, coopvec, pull, steered, loss = scratch
    between = (counters, coopvec, pull, steered, loss)
    _, N, D = features[0].shape
    shared = {"D": D, "N": N, "EXPERTS": launch.experts, "num_warps": launch.num_warps,
              "maxnreg": REGISTERS}  # fmt: skip
    first = {**shared, "SAMPLES": launch.held, "COLUMNS": launch.block, "CLASSES": launch.lanes}
    second = {**shared, "ROWS": ROWS, "COLUMNS": COLUMNS, "SCALING": scaling, "CENTERED": centered}
    found = []
    for t, z in enumerate(features):
        M, C, K = len(z), products[t].shape[2], rows[t].numel()
        gram = grams[t] if grams[t].numel() else None
        task = (state, z, products[t], gram, biases[t], labels[t] if labels else None, rows[t])
        samples = (*task, alignment, *between, M, K, batch, C)
        programs = -(-min(batch, K) // launch.held)
        found.append(Launch(neulig_fit_samples_kernel, programs, samples, first))
        parameters = (state, z, rows[t], *between, rates, terms, M, K, batch, len(features), t)
        programs = N * D // COLUMNS + 1
        found.append(Launch(neulig_fit_parameters_kernel, programs, parameters, second))
    return found


def scratch(
    state: torch.Tensor, experts: int, batch: int, step: int, steps: int, lr: float
) -> tuple[torch.Tensor, ...]:
    """counters (2,) at zero, rates (steps, 2), and what a step's first launch leaves (batch, N)."""
    number = torch.arange(step + 1, step + 1 + steps, dtype=torch.float64, device=state.device)
    rates = torch.stack((lr / (1 - 0.9**number), (1 - 0.999**number).sqrt()), 1).to(state.dtype)
    counters = torch.zeros(2, dtype=torch.int64, device=state.device)
    left = [state.new_empty(batch, experts) for _ in range(3)]
    return (counters, rates, *left, state.new_empty(batch))


def neulig_fit(
    state: torch.Tensor,
    features: list[torch.Tensor],
    products: list[torch.Tensor],
    grams: list[torch.Tensor],
    biases: list[torch.Tensor],
    labels: list[torch.Tensor],
    rows: list[torch.Tensor],
    alignment: torch.Tensor,
    step: int,
    batch: int,
    lr: float,
    scaling: float,
    centered: bool,
    launch: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The new state and the loss terms (R, T, 2); arguments as the op's, all contiguous.

    Raises:
        ValueError: no kernel can run on the device of the state.
    """
    require("neulig_fit", missing_on(state.device.type))
    N, R, T = alignment.shape[0], -(-rows[0].numel() // batch), len(features)
    result, terms = state.clone(), state.new_empty(R, T, 2)
    if R == 0:
        return result, terms
    batch = min(batch, max(row.numel() for row in rows))
    lists = (features, products, grams, biases, labels, rows)
    kept = scratch(state, N, batch, step, R * T, lr)
    launch = launch or config("neulig_fit", features[0].dtype, N, 1)
    found = round_launches(result, lists, alignment, kept, terms, batch, scaling, centered, launch)
    repeat(state, found, R)
    return result, terms
