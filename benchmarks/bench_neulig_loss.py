"""neulig_loss: the loss of one batch of cached features, alone and with its gradients.

Sizes are those of experts with D = 512 (ViT-B/32), 768 (ViT-L/14) or 1024 (RN50), and heads of 10
(CIFAR10), 43 (GTSRB), 100 (CIFAR100) or 1000 classes. The others: the formula as one would write it
in eager PyTorch, and torch.compile of our reference; both under autograd in fwd+bwd. fwd+bwd asks
for the gradients of the Portland, as a step of training does; 1000 / ms_q50 is steps/s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neulig_fast import testing
from neulig_fast.ops.neulig_loss import OP, neulig_loss_reference

from . import harness, machine
from .harness import Case, Provider

Arguments = tuple[Any, ...]
_TRAINED = (1, 2)  # the Portland's weight and bias among the op's arguments


def eager(z, W, c, H, h, t, A, boosting, scaling, normalize, centered) -> tuple[Tensor, ...]:
    """The paper's formula for supervised boosting, normalised features and w'Aw."""
    w = torch.softmax(F.linear(z.flatten(1), W, c), 1)
    ensembled = torch.einsum("bn,bnd->bd", w, z)
    logits = F.linear(ensembled / ensembled.norm(dim=1, keepdim=True), H, h)
    boosting = F.cross_entropy(logits, t)
    alignment = torch.einsum("bi,ij,bj->b", w, A, w).mean() / scaling
    return boosting + alignment, boosting, alignment, w


def arguments(sizes: tuple[int, ...], device: str) -> Arguments:
    """The op's arguments for (B, N, D, C): random features, a normalised head, an fp32 batch."""
    B, N, D, C = sizes
    g = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    A = draw(N, N)
    tensors = (
        draw(B, N, D),
        draw(N, N * D) / (N * D) ** 0.5,
        draw(N) / (N * D) ** 0.5,
        F.normalize(draw(C, D), dim=1),
        draw(C) / 10,
        torch.randint(C, (B,), generator=g),
        A @ A.T,
    )
    return (*(t.to(device) for t in tensors), "supervised", 100.0, True, False)


def with_gradients(function: Callable[..., Any], args: Arguments) -> tuple[Tensor, ...]:
    """The loss and its gradients with respect to the Portland."""
    args = list(args)
    for k in _TRAINED:
        args[k] = args[k].detach().requires_grad_()
    loss = function(*args)[0]
    return (loss.detach(), *torch.autograd.grad(loss, [args[k] for k in _TRAINED]))


def gradient_check(args: Arguments) -> Callable[[tuple[Tensor, ...]], None]:
    working = with_gradients(neulig_loss_reference, args)
    exact = with_gradients(neulig_loss_reference, testing.cast(args, torch.float64))

    def compare(result: tuple[Tensor, ...]) -> None:
        for got, at_dtype, oracle in zip(result, working, exact, strict=True):
            testing.assert_within_rule(got, at_dtype, oracle, OP.terms(*args))

    return compare


def make_case(mode: str, sizes: tuple[int, ...], device: str) -> Case:
    args = arguments(sizes, device)
    op = torch.ops.neulig_fast.neulig_loss.default
    compiled = harness.compiled(neulig_loss_reference)
    run = (lambda f: f(*args)) if mode == "fwd" else (lambda f: with_gradients(f, args))
    B, N, D, C = sizes
    once = (
        2 * B * D * (N * N + N + C)
    )  # the backward pass: once more, with the features as constant
    return Case(
        op="neulig_loss",
        mode=mode,
        shape="B{} N{} D{} C{}".format(*sizes),
        dtype=torch.float32,
        device=device,
        threads=machine.cores(),
        providers=[
            *harness.ours(OP, device, lambda: run(op), args),
            Provider("eager formula", lambda: run(eager)),
            Provider("torch.compile", lambda: run(compiled)),
        ],
        check=(lambda result: testing.assert_op_close(OP, result, args))
        if mode == "fwd"
        else gradient_check(args),
        traffic=sum(a.nbytes for a in args if isinstance(a, Tensor)),
        flops=once if mode == "fwd" else 2 * once,
        numbers={"N": N},
    )


def shapes() -> list[tuple[int, ...]]:
    """(B, N, D, C): every head on ViT-B/32, every number and width of experts with 100 classes."""
    heads = [(128, 5, 512, C) for C in (10, 43, 100, 1000)]
    experts = [(128, N, D, 100) for N in (2, 5, 7) for D in (512, 768, 1024)]
    return list(dict.fromkeys([*heads, *experts, (128, 7, 1024, 1000)]))


def cases(device: str, quick: bool) -> Iterator[Case]:
    for sizes in [(8, 3, 16, 6)] if quick else shapes():
        for mode in ("fwd", "fwd+bwd"):
            yield make_case(mode, sizes, device)


if __name__ == "__main__":
    harness.main("neulig_loss", cases)
