"""Networks of different origin: they share an architecture and the space of their outputs only.

A small CLIP gives every class its text embedding. Every origin then starts from random weights of
its own, learns the plain pictures of all tasks in an order of its own, straight against those
embeddings, and is fine-tuned into experts of a task, or of a part of its classes.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from ..neulig import zero_shot_head
from . import clip, training
from .pipeline import Stages
from .settings import DemoSettings, derived_seed
from .tasks import TASK_NAMES, TaskData, make_task
from .training import Progress, Recipe

Key = TypeVar("Key", bound=tuple[Any, Any])
Trained = TypeVar("Trained")


class Member(NamedTuple):
    """An expert: its origin's number, its task, and which of the task's classes it learns."""

    origin: int
    task: str
    classes: range | None = None  # None: all

    @property
    def known(self) -> range:
        """The classes that it learns, as the task counts them."""
        return self.classes or range(_num_classes(self.task))

    @property
    def title(self) -> str:
        """``letters``, or ``letters 14-26`` for a part of the classes."""
        part = f" {self.known.start + 1}-{self.known.stop}"
        return self.task + (part if self.classes else "")

    def head(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The rows (C, D) of its own classes."""
        return weights[self.task][self.known.start : self.known.stop]


class Group(NamedTuple):
    """Experts that are merged with one another."""

    architecture: str
    members: tuple[Member, ...]


_HALVES = (Member(0, "letters", range(13)), Member(1, "letters", range(13, 26)))
_TASKS = (Member(0, "letters"), Member(1, "textures"))
GROUPS = {
    "ViT, two tasks": Group("vit", _TASKS),
    "ViT, halves of one task": Group("vit", _HALVES),
    "ViT, three tasks": Group("vit", (*_TASKS, Member(2, "shapes"))),
    "ResNet, two tasks": Group("resnet", _TASKS),
    "ResNet, halves of one task": Group("resnet", _HALVES),
}


@dataclass(frozen=True)
class Rates:
    """How one architecture is trained: steps on the plain pictures, then steps per class."""

    plain_steps: int
    steps_per_class: int
    lr: float
    matrix_lr: float
    batch: int = 64
    fine_tuning: float = 0.5  # the share of both rates that is left


@dataclass(frozen=True)
class OriginSettings:
    """Sizes and rates of the demonstration, chosen on the validation splits."""

    demo: DemoSettings = field(
        default_factory=lambda: DemoSettings(width=64, layers=2, pretrain_steps=240)
    )
    width: int = 128  # of the ViT
    layers: int = 2
    rates: Mapping[str, Rates] = field(
        default_factory=lambda: {
            "vit": Rates(plain_steps=300, steps_per_class=12, lr=1e-3, matrix_lr=0.02),
            "resnet": Rates(plain_steps=150, steps_per_class=5, lr=2e-3, matrix_lr=0.0),
        }
    )
    calibration: int = 256  # images per expert: for activations, balances and statistics
    balances: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    portland_epochs: int = 200
    points: int = 7  # of a curve from one expert to another

    @classmethod
    def toy(cls) -> OriginSettings:
        """The same in seconds, for tests; it learns little."""
        rates = Rates(plain_steps=2, steps_per_class=1, lr=1e-3, matrix_lr=0.02, batch=8)
        return cls(
            demo=dataclasses.replace(DemoSettings.toy(), pretrain_steps=2, test_size=24),
            width=32,
            layers=1,
            rates={"vit": rates, "resnet": rates},
            calibration=16,
            balances=(0.5,),
            portland_epochs=2,
            points=3,
        )


class Output(NamedTuple):
    """Text embeddings of one class each: the rows (C, D) of every task's frozen head."""

    weights: dict[str, Tensor]
    plain: TaskData  # plain pictures of all tasks, labelled by row of all heads together


def make_output(settings: OriginSettings, stages: Stages) -> Output:
    """Pre-train a small CLIP as the demo does, and keep nothing but its text embeddings."""
    demo = settings.demo
    tasks = [
        make_task(name, style="plain", size=demo.plain_per_class * _num_classes(name))
        for name in TASK_NAMES
    ]
    with stages.stage("one text tower, from a small CLIP") as bars:
        bar = bars.add_task("pre-training", total=demo.pretrain_steps)
        model = training.pretrain(
            tasks, demo, lambda step, steps, loss: bars.update(bar, completed=step)
        )
        encode = clip.tokenizer()
        weights = {
            task.name: zero_shot_head(model, encode, task.class_names, task.templates).weight
            for task in tasks
        }
    starts = torch.tensor([0, *(len(task.class_names) for task in tasks)]).cumsum(0)
    plain = TaskData(
        name="plain",
        images=torch.cat([task.images for task in tasks]),
        labels=torch.cat([t.labels + start for t, start in zip(tasks, starts, strict=False)]),
        class_names=tuple(name for task in tasks for name in task.class_names),
        templates=(),
    )
    return Output(weights, plain)


@functools.cache
def _num_classes(name: str) -> int:
    return len(make_task(name, size=0).class_names)


def draw(member: Member, settings: OriginSettings, split: str) -> TaskData:
    """The pictures that a member learns or is tested on, labelled within its own classes."""
    name, demo = member.task, settings.demo
    size = demo.test_size if split != "train" else demo.train_per_class * _num_classes(name)
    task = make_task(name, split=split, size=size, seed=demo.seed)
    known = member.known
    own = (task.labels >= known.start) & (task.labels < known.stop)
    return TaskData(
        name=member.title,
        images=task.images[own],
        labels=task.labels[own] - known.start,
        class_names=task.class_names[known.start : known.stop],
        templates=task.templates,
    )


_RANDOM_STATE = threading.Lock()


def build(architecture: str, settings: OriginSettings, features: int, seed: int = 0) -> nn.Module:
    """A network with seeded random weights; the global random state stays as it is.

    Threads share that state: one of them builds at a time.
    """
    with _RANDOM_STATE, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "resnet":
            return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=features)
        return VisionTransformer(
            image_size=32, patch_size=8, width=settings.width, layers=settings.layers,
            heads=settings.width // 32, mlp_ratio=4.0, output_dim=features,
        )  # fmt: skip


def train(
    groups: Iterable[Group], output: Output, settings: OriginSettings, stages: Stages
) -> dict[tuple[str, Member], dict[str, Tensor]]:
    """State dicts of all groups' experts by architecture and member.

    ``settings.demo.threads`` networks are trained at a time; the bits depend neither on that nor on
    the other networks.
    """
    wanted = {(group.architecture, member): None for group in groups for member in group.members}
    origins = {(architecture, member.origin): None for architecture, member in wanted}
    born = functools.partial(_origin, output, settings)
    networks = _together(born, origins, "origins", settings, stages)
    tuned = functools.partial(_expert, output, settings, networks)
    return _together(tuned, wanted, "experts", settings, stages)


Origin = tuple[str, int]  # architecture and number


def _origin(output: Output, settings: OriginSettings, key: Origin, progress: Progress) -> nn.Module:
    architecture, number = key
    rates, seed = settings.rates[architecture], settings.demo.seed
    heads = torch.cat(list(output.weights.values()))
    network = build(architecture, settings, heads.shape[1], derived_seed(seed, 4, number))
    recipe = Recipe(
        rates.plain_steps, rates.batch, rates.lr, rates.matrix_lr, derived_seed(seed, 5, number)
    )
    training.fit_tower(network, heads, output.plain, recipe, progress)
    return network


def _expert(
    output: Output,
    settings: OriginSettings,
    networks: Mapping[Origin, nn.Module],
    key: tuple[str, Member],
    progress: Progress,
) -> dict[str, Tensor]:
    architecture, member = key
    rates, data = settings.rates[architecture], draw(member, settings, "train")
    network = copy.deepcopy(networks[architecture, member.origin])
    recipe = Recipe(
        rates.steps_per_class * len(data.class_names),
        rates.batch,
        rates.lr * rates.fine_tuning,
        rates.matrix_lr * rates.fine_tuning,
        derived_seed(settings.demo.seed, 6, member.origin),
    )
    training.fit_tower(network, member.head(output.weights), data, recipe, progress)
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def _together(
    job: Callable[[Key, Progress], Trained],
    keys: Iterable[Key],
    what: str,
    settings: OriginSettings,
    stages: Stages,
) -> dict[Key, Trained]:
    """``job(key, progress)`` of every key, on all threads, with a bar each."""
    keys = list(keys)
    with (
        stages.stage(f"training {len(keys)} {what}") as bars,
        training.thread_pool(settings.demo.threads) as pool,
    ):

        def run(key: Key) -> Trained:
            bar = bars.add_task(f"{what[:-1]} of {key[0]}", total=None)
            return job(key, lambda step, steps, _: bars.update(bar, total=steps, completed=step))

        return dict(zip(keys, pool.map(run, keys), strict=True))
