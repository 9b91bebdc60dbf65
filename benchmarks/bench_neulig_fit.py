"""Training the Portland: steps over cached features against running all experts in every step.

``steps`` compares the ways to train once the features are there: the operator of many steps against
the formula in eager PyTorch and in torch.compile, with autograd and PyTorch's fused Adam. One task,
one epoch of ``_STEPS`` batches. ``products made in the run`` counts what the operator needs of the
head once per fit, over one epoch only.

The rest is of whole fits: five experts, one batch of 128 images of one task, so that a step is an
epoch. Times are per step; 1000 / ms_q50 is steps/s. The published way encodes the batch with every
expert, evaluates the formula under autograd and asks for the loss's value. ``cache filled in the
run`` counts the one pass of every image through every expert that the cache needs, here spread over
``_STEPS`` epochs only: end to end, caching gains at most as many times as there are epochs.

ViT-B/32 encodes too slowly on a CPU to be run in full: a part of the batch is encoded, by one
model five times over, and its time is scaled up; the row's mode says so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from neulig_fast import testing
from neulig_fast.neulig.features import FeatureCache
from neulig_fast.neulig.heads import Head
from neulig_fast.neulig.penalty import Penalty
from neulig_fast.neulig.portland import Portland
from neulig_fast.neulig.steps import products_of
from neulig_fast.neulig.train import FitSettings, TaskData, Trainer
from neulig_fast.ops.neulig_fit import OP
from neulig_fast.pool import ExpertPool

from . import harness, machine
from .bench_neulig_loss import eager
from .harness import Case, Provider
from .towers import DEMO, TOY, VIT_B_32, image_tower

_EXPERTS, _BATCH, _STEPS, _PART, _LR, _SCALING = 5, 128, 20, 8, 1e-3, 10.0
# N, D, C: what one of them costs, and the corners.
_SIZES = (
    *((5, 512, 10), (5, 512, 43), (5, 512, 100), (5, 512, 1000), (5, 128, 26), (5, 1024, 100)),
    *((2, 512, 100), (2, 768, 1000), (7, 512, 43), (7, 768, 100), (7, 1024, 1000)),
)
_TASK_ROWS, _EPOCHS = 5000, 25  # 1000 rounds in batches of 128, one of each task


def head_and_penalty(classes: int, embed: int, device: str) -> tuple[Head, Tensor, Penalty]:
    """A head, labels for a batch, and ½ D̂ of experts that are all equally far apart."""
    g = torch.Generator().manual_seed(4)
    weight = nn.functional.normalize(torch.randn(classes, embed, generator=g), dim=1)
    labels = torch.randint(classes, (_BATCH,), generator=g).to(device)
    matrix = (1 - torch.eye(_EXPERTS, dtype=torch.float64)) / 2
    return Head(weight.to(device)), labels, Penalty(matrix, False, _SCALING)


# -- the two ways: the loss of every step ---------------------------------------------------------


def cached(features: Tensor, labels: Tensor, head: Head, penalty: Penalty) -> Tensor:
    settings = FitSettings(epochs=_STEPS, lr=_LR, batch_size=_BATCH, scaling=_SCALING)
    task = TaskData("task", features, labels, head)
    _, history = Trainer([task], penalty, settings).run()
    return (history.boosting + history.alignment)[:, 0]


def recomputed(
    encode: Callable[[], Tensor], labels: Tensor, head: Head, penalty: Penalty, steps: int
) -> Tensor:
    """The published loop; ``encode`` gives the batch's features (B, N, D)."""
    losses: list[float] = []
    portland = optimizer = None
    for _ in range(steps):
        with torch.no_grad():
            z = encode()
        if portland is None:
            portland = Portland(z.shape[1], z.shape[2], 0, z.dtype).to(z.device)
            optimizer = torch.optim.Adam(portland.parameters(), lr=_LR)
            weight, matrix = head.weight.to(z.dtype), penalty.matrix.to(z)
        settings = ("supervised", _SCALING, True, False)
        loss = eager(z, portland.weight, portland.bias, weight, None, labels, matrix, *settings)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=z.dtype)


def encode(towers: list[nn.Module], images: Tensor) -> Tensor:
    return torch.stack([tower(images) for tower in towers], 1)


# -- steps: the Portland's parameters, and the loss of every step ---------------------------------


def trained(
    features: Tensor, labels: Tensor, head: Head, penalty: Penalty, loss: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    """One epoch with autograd and PyTorch's fused Adam."""
    _, n, d = features.shape
    portland = Portland(n, d, 0, features.dtype).to(features.device)
    optimizer = torch.optim.Adam(portland.parameters(), lr=_LR, fused=True)
    weight, matrix = head.weight.to(features.dtype), penalty.matrix.to(features)
    settings, losses = ("supervised", _SCALING, True, False), []
    for z, t in zip(features.split(_BATCH), labels.split(_BATCH), strict=True):
        out = loss(z, portland.weight, portland.bias, weight, None, t, matrix, *settings)[0]
        optimizer.zero_grad()
        out.backward()
        optimizer.step()
        losses.append(out.detach())
    parameters = torch.cat([p.detach().flatten() for p in portland.parameters()])
    return parameters, torch.stack(losses)


def steps_case(experts: int, embed: int, classes: int, device: str) -> Case:
    """``_STEPS`` steps over random features."""
    g = torch.Generator().manual_seed(8)
    rows = _STEPS * _BATCH
    features = torch.randn(rows, experts, embed, generator=g).to(device)
    weight = 100 * nn.functional.normalize(torch.randn(classes, embed, generator=g), dim=1)
    labels, head = torch.randint(classes, (rows,), generator=g).to(device), Head(weight.to(device))
    matrix = ((1 - torch.eye(experts)) / 2).to(device)
    penalty, task = Penalty(matrix, False, _SCALING), TaskData("task", features, labels, head)
    data = (features, labels, head, penalty)
    fit = FitSettings(batch_size=_BATCH)
    products = products_of([task], torch.float32, fit, _STEPS)
    providers = [
        Provider("eager formula", lambda: trained(*data, eager), steps=_STEPS),
        Provider("torch.compile", lambda: trained(*data, compiled), steps=_STEPS),
    ]
    compiled = harness.compiled(eager)
    if products is not None:
        start = Portland(experts, embed, 0)
        state = torch.zeros(3, experts * experts * embed + experts, device=device)
        state[0] = torch.cat([p.detach().flatten() for p in start.parameters()])
        order = torch.arange(rows, device=device)
        args = (state, [features], *products, [labels], [order], matrix, 0, _BATCH, _LR, _SCALING,
                False)  # fmt: skip

        def run(arguments: tuple[Any, ...] = args) -> tuple[Tensor, Tensor]:
            after, terms = OP(*arguments)
            return after[0], terms.sum(2)[:, 0]

        def run_from_heads() -> tuple[Tensor, Tensor]:
            made = products_of([task], torch.float32, fit, _STEPS)
            return run((*args[:2], *(made or products), *args[5:]))

        ours = harness.ours(OP, device, run, args)
        providers += [dataclasses.replace(provider, steps=_STEPS) for provider in ours]
        name, note = "neulig_fast, products made in the run", f"one epoch of {_STEPS} steps"
        providers.append(Provider(name, run_from_heads, "ours", steps=_STEPS, note=note))

    def check(result: tuple[Tensor, Tensor]) -> None:
        working = trained(*data, eager)
        exact = trained(features.double(), labels, head, penalty, eager)
        for got, at_dtype, oracle in zip(result, working, exact, strict=True):
            testing.assert_within_rule(got, at_dtype, oracle, _STEPS * experts * embed)

    head_flops = embed * (experts + classes)
    return Case(
        op="neulig_fit",
        mode="steps",
        shape=f"B{_BATCH} N{experts} D{embed} C{classes}",
        dtype=torch.float32,
        device=device,
        threads=machine.cores(),
        providers=providers,
        check=check,
        traffic=features.nbytes // _STEPS,
        flops=4 * _BATCH * (experts**2 * embed + head_flops),
        numbers={"N": experts},
    )


# -- the cases ------------------------------------------------------------------------------------


def make_case(shape: str, device: str, providers: list[Provider], check: Callable) -> Case:
    """A whole fit."""
    settings = {"dtype": torch.float32, "device": device, "threads": machine.cores()}
    case = Case("neulig_fit", "fit", shape, **settings, providers=providers, check=check)
    return dataclasses.replace(case, numbers={"N": _EXPERTS})


def small_case(shape: str, embed: int, vision: dict, classes: int, device: str) -> Case:
    """Experts small enough for the published way to be run in full."""
    towers = [image_tower(embed, vision, seed, device) for seed in range(_EXPERTS)]
    size = vision["image_size"]
    images = torch.randn(_BATCH, 3, size, size, generator=torch.Generator().manual_seed(5))
    images = images.to(device)
    head, labels, penalty = head_and_penalty(classes, embed, device)
    pool = ExpertPool(towers, device=device)
    features = FeatureCache(pool).features(images)

    @functools.cache
    def expected(dtype: torch.dtype) -> Tensor:
        known = features.to(dtype)
        return recomputed(lambda: known, labels, head, penalty, _STEPS)

    def check(result: Tensor) -> None:
        working = expected(torch.float32)
        testing.assert_within_rule(result, working, expected(torch.float64), _EXPERTS * embed)

    def filled() -> Tensor:
        return cached(FeatureCache(pool).features(images), labels, head, penalty)

    def published() -> Tensor:
        return recomputed(lambda: encode(towers, images), labels, head, penalty, _STEPS)

    name, note = "neulig_fast", f"cache filled in the run, {_STEPS} epochs"
    found = [
        Provider(name, lambda: cached(features, labels, head, penalty), "ours", steps=_STEPS),
        Provider(f"{name}, cache filled in the run", filled, "ours", steps=_STEPS, note=note),
        Provider("published: experts in every step", published, steps=_STEPS),
    ]
    return make_case(shape, device, found, check)


def extrapolated(labels: Tensor, head: Head, penalty: Penalty, device: str) -> Provider:
    """The published way with ViT-B/32 experts, of which a part of one batch is run."""
    towers = [image_tower(head.weight.shape[1], VIT_B_32, 0, device)] * _EXPERTS
    g = torch.Generator().manual_seed(6)
    images = torch.randn(_PART, 3, 224, 224, generator=g).to(device)

    def published() -> Tensor:
        return recomputed(lambda: encode(towers, images), labels[:_PART], head, penalty, 1)

    name, note = "published: experts in every step", f"from {_PART} of {_BATCH} images of one step"
    return Provider(
        name, published, steps=_PART / _BATCH, note=f"extrapolated {note}", checked=False
    )


def large_case(device: str) -> Case:
    embed, g = 512, torch.Generator().manual_seed(6)
    features = torch.randn(_BATCH, _EXPERTS, embed, generator=g).to(device)
    head, labels, penalty = head_and_penalty(100, embed, device)

    def train() -> Tensor:
        return cached(features, labels, head, penalty)

    def check(result: Tensor) -> None:
        shared = functools.partial(recomputed, labels=labels, head=head, penalty=penalty)
        working = shared(lambda: features, steps=_STEPS)
        exact = shared(features.double, steps=_STEPS)
        testing.assert_within_rule(result, working, exact, _EXPERTS * embed)

    found = [
        Provider("neulig_fast", train, "ours", steps=_STEPS),
        extrapolated(labels, head, penalty, device),
    ]
    return make_case("ViT-B-32", device, found, check)


def whole_case(device: str) -> Case:
    """1000 rounds over five tasks of 5000 cached images: 5000 steps in 25 epochs."""
    embed, classes, g = 512, (10, 43, 100, 26, 47), torch.Generator().manual_seed(7)
    tasks = []
    for k, count in enumerate(classes):
        weight = nn.functional.normalize(torch.randn(count, embed, generator=g), dim=1)
        features = torch.randn(_TASK_ROWS, _EXPERTS, embed, generator=g).to(device)
        labels = torch.randint(count, (_TASK_ROWS,), generator=g).to(device)
        tasks.append(TaskData(f"task {k}", features, labels, Head(weight.to(device))))
    _, _, penalty = head_and_penalty(1, embed, device)
    rounds = _EPOCHS * -(-_TASK_ROWS // _BATCH)

    def train() -> Tensor:
        settings = FitSettings(epochs=_EPOCHS, lr=_LR, batch_size=_BATCH, scaling=_SCALING)
        _, history = Trainer(tasks, penalty, settings).run()
        return history.boosting

    def check(result: Tensor) -> None:
        if result.shape[0] != rounds or not bool(result.isfinite().all()):
            raise AssertionError(f"expected {rounds} rounds of finite losses, got {result.shape}")

    found = [
        Provider("neulig_fast", train, "ours", steps=rounds * len(tasks)),
        extrapolated(tasks[0].labels, tasks[0].head, penalty, device),
    ]
    return make_case(f"ViT-B-32, {len(tasks)} tasks, {rounds} rounds", device, found, check)


def cases(device: str, quick: bool) -> Iterator[Case]:
    if quick:
        yield small_case("toy", 16, TOY, 7, device)
        yield steps_case(3, 16, 7, device)
        return
    for sizes in _SIZES:
        yield steps_case(*sizes, device)
    yield small_case("demo ViT", 128, DEMO, 26, device)
    yield large_case(device)
    yield whole_case(device)


if __name__ == "__main__":
    harness.main("neulig_fit", cases)
