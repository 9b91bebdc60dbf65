"""The demo's training: contrastive pre-training of the origin, fine-tuning of the experts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip import CLIP
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .clip import build_model, expand_vocabulary, prompt_tokens, used_tokens
from .muon import Muon
from .settings import DemoSettings, derived_seed
from .tasks import TASK_NAMES, TaskData, normalise

MAX_SHIFT = 2  # pixels
MAX_LOGIT_SCALE = math.log(100)  # OpenAI's CLIP
SHARDS = 2  # of a pre-training batch
Progress = Callable[[int, int, float], None]  # step (from 1), steps, loss

NamedProgress = Callable[[str, int, int, float], None]  # the same, after the task's name


# ---- what both stages share --------------------------------------------------------------------


@contextmanager
def thread_pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Python threads that each run torch's operators on one thread, and the faster matrix product.

    torch's own two threads gain about as much on quiet cores, but where another program keeps a
    core busy they lose far more: OpenMP's threads spin at the end of every operator.

    "medium" lets torch take oneDNN's product, which is faster than MKL's on a CPU with AVX-512 (and
    still in fp32 on an AMD EPYC); the math form of attention goes with it, because the flash kernel
    calls tiny products, which are slow that way.
    """
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("medium")
    try:
        with (
            sdpa_kernel(SDPBackend.MATH),
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            yield pool
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


def _batches(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` batches of indices, each drawn image seen once before any is seen again."""
    queue = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(queue) < size:
            queue = torch.cat([queue, torch.randperm(count, generator=generator)])
        yield queue[:size]
        queue = queue[size:]


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Normalise images (B, 3, 32, 32) uint8 and move each by up to 2 pixels."""
    count, _, height, width = images.shape
    padded = F.pad(normalise(images), (MAX_SHIFT,) * 4, mode="replicate").permute(0, 2, 3, 1)
    move = torch.randint(2 * MAX_SHIFT + 1, (2, count, 1), generator=generator)
    rows, columns = move[0] + torch.arange(height), move[1] + torch.arange(width)
    batch = torch.arange(count)[:, None, None]
    return padded[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _updater(model: nn.Module, lr: float, matrix_lr: float, steps: int) -> Callable[[int], None]:
    """A function that takes step number `step` (from 0) with the gradients that the model holds.

    Muon at `matrix_lr` for the transformer blocks' matrices, AdamW at `lr` for the rest; both rates
    rise for a tenth of the steps and fall to zero along a cosine.
    """
    named = dict(model.named_parameters())
    blocks = {name: p for name, p in named.items() if "resblocks" in name and p.ndim == 2}
    rest = [p for name, p in named.items() if name not in blocks]
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    rates: list[tuple[torch.optim.Optimizer, float]] = [(adam, lr)]
    if blocks:
        rates.append((Muon(blocks.values(), lr=matrix_lr), matrix_lr))
    warm_up = max(1, steps // 10)

    def update(step: int) -> None:
        rise = (step + 1) / warm_up
        fall = 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
        for optimiser, rate in rates:
            for group in optimiser.param_groups:
                group["lr"] = rate * (rise if step < warm_up else fall)
            optimiser.step()
        model.zero_grad()

    return update


# ---- pre-training ------------------------------------------------------------------------------


def _contrast(
    pool: ThreadPoolExecutor, model: CLIP, prompts: Tensor, images: Tensor, labels: Tensor
) -> float:
    """CLIP's image-to-text loss of a batch; leaves its gradients in the parameters.

    The batch is cut in two shards for two threads, their gradients averaged in a fixed order.
    """
    parameters = list(model.parameters())

    def shard(images: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        text = model.encode_text(prompts, normalize=True)
        image = model.encode_image(images, normalize=True)
        loss = F.cross_entropy(model.logit_scale.exp() * image @ text.T, labels)
        return loss.detach(), torch.autograd.grad(loss, parameters)

    losses, gradients = zip(
        *pool.map(shard, images.chunk(SHARDS), labels.chunk(SHARDS)), strict=True
    )
    for parameter, *shards in zip(parameters, *gradients, strict=True):
        parameter.grad = torch.stack(shards).mean(0)
    return torch.stack(losses).mean().item()


def pretrain(
    tasks: Sequence[TaskData], settings: DemoSettings, progress: Progress | None = None
) -> CLIP:
    """Train a CLIP from random weights on all tasks' images and prompts together.

    Every step draws a batch of images and one of the prompts of every class; the loss is CLIP's
    image-to-text half, with the prompts of all classes as candidates. The same arguments give the
    same bits, whatever `settings.threads` is.

    Returns:
        The model in eval mode, over open_clip's full vocabulary.
    """
    tokens = used_tokens(tasks)
    prompts = torch.searchsorted(tokens, prompt_tokens(tasks))  # (templates, classes, 16)
    images = torch.cat([task.images for task in tasks])
    starts = torch.tensor([0, *(len(task.class_names) for task in tasks)]).cumsum(0)
    labels = torch.cat(
        [task.labels + start for task, start in zip(tasks, starts[:-1], strict=True)]
    )
    model = build_model(settings, len(tokens)).train()
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, 1))
    steps = settings.pretrain_steps
    update = _updater(model, settings.pretrain_lr, settings.pretrain_matrix_lr, steps)
    every_class = torch.arange(prompts.shape[1])
    with thread_pool(settings.threads) as pool:
        batches = _batches(len(images), settings.pretrain_batch, steps, generator)
        for step, batch in enumerate(batches):
            drawn = torch.randint(len(prompts), every_class.shape, generator=generator)
            pixels = _augment(images[batch], generator)
            loss = _contrast(pool, model, prompts[drawn, every_class], pixels, labels[batch])
            update(step)
            with torch.no_grad():
                model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
            if progress is not None:
                progress(step + 1, steps, loss)
    return expand_vocabulary(model, tokens, settings)


# ---- training in front of a frozen head --------------------------------------------------------


class Recipe(NamedTuple):
    """How long and how fast an image tower is trained, and the seed of its batches."""

    steps: int
    batch: int
    lr: float
    matrix_lr: float  # of the transformer blocks' matrices
    seed: int


def fit_tower(
    visual: nn.Module,
    head_weight: Tensor,
    task: TaskData,
    recipe: Recipe,
    progress: Progress | None = None,
) -> None:
    """Train an image tower in place, in front of a frozen head.

    Args:
        head_weight: (C, D), the unit text features times exp(logit_scale); logits are its product
            with the images' unit features.
        task: the training images.

    Raises:
        ValueError: the head has another number of classes than the task.
    """
    if len(head_weight) != len(task.class_names):
        raise ValueError(
            f"fit_tower: head_weight for {task.name} must be ({len(task.class_names)}, D), "
            f"got {tuple(head_weight.shape)}"
        )
    visual.train()
    generator = torch.Generator().manual_seed(recipe.seed)
    update = _updater(visual, recipe.lr, recipe.matrix_lr, recipe.steps)
    batches = _batches(len(task.images), recipe.batch, recipe.steps, generator)
    for step, batch in enumerate(batches):
        features = F.normalize(visual(_augment(task.images[batch], generator)), dim=-1)
        loss = F.cross_entropy(features @ head_weight.T, task.labels[batch])
        loss.backward()
        update(step)
        if progress is not None:
            progress(step + 1, recipe.steps, loss.item())


# ---- fine-tuning -------------------------------------------------------------------------------


def fine_tune(
    visual: nn.Module,
    head_weight: Tensor,
    task: TaskData,
    settings: DemoSettings,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Fine-tune a copy of an image tower on one of the demo's tasks; see :func:`fit_tower`.

    Returns:
        The trained tower's state dict.

    Raises:
        ValueError: the head has another number of classes than the task.
    """
    visual = copy.deepcopy(visual)
    recipe = Recipe(
        steps=settings.fine_tune_steps_per_class * len(task.class_names),
        batch=settings.fine_tune_batch,
        lr=settings.fine_tune_lr,
        matrix_lr=settings.fine_tune_matrix_lr,
        seed=derived_seed(settings.seed, 2, TASK_NAMES.index(task.name)),
    )
    fit_tower(visual, head_weight, task, recipe, progress)
    return {name: tensor.detach().clone() for name, tensor in visual.state_dict().items()}


def fine_tune_all(
    visual: nn.Module,
    head_weights: Mapping[str, Tensor],
    tasks: Mapping[str, TaskData],
    settings: DemoSettings,
    progress: NamedProgress | None = None,
) -> dict[str, dict[str, Tensor]]:
    """One expert per task, `settings.threads` of them at a time, the longest job first.

    Args:
        visual: the image tower that every expert starts from; it stays as it is.
        head_weights: per task (C, D), see `fine_tune`.
        tasks: per task its training images.
        progress: called from the training threads with the task's name, step, steps and loss.

    Returns:
        Image-tower state dicts by task, in the order of `tasks`. The bits depend neither on
        `settings.threads` nor on the other tasks.

    Raises:
        ValueError: heads and tasks have different names.
        Exception: what one expert's training raised, once the experts under way have ended.
    """
    if set(head_weights) != set(tasks):
        raise ValueError(
            "fine_tune_all: heads and tasks must have the same names, got "
            f"{sorted(head_weights)} and {sorted(tasks)}"
        )

    def train(name: str) -> dict[str, Tensor]:
        def report(step: int, steps: int, loss: float) -> None:
            if progress is not None:
                progress(name, step, steps, loss)

        return fine_tune(visual, head_weights[name], tasks[name], settings, report)

    longest_first = sorted(tasks, key=lambda name: -len(tasks[name].class_names))
    with thread_pool(settings.threads) as pool:
        experts = dict(zip(longest_first, pool.map(train, longest_first), strict=True))
    return {name: experts[name] for name in tasks}
