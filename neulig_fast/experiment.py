"""``neulig-fast train``: from a checked configuration to the files of a finished run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from . import image_folder
from ._checks import did_you_mean, raise_all
from .clip_models import (
    ClipModel,
    Expert,
    build_clip,
    clip_faults,
    common_text_tower,
    foreign,
    read_expert,
)
from .image_folder import ImageDataset, ImageFolder, ImageLoader, Transform
from .neulig import NeuLig, Report, zero_shot_head
from .neulig.batchnorm import policy_faults
from .outputs import rendered, write_results
from .pool import ExpertPool
from .state_files import make_writable_folder
from .train_config import TaskConfig, TrainConfig

Say = Callable[[str], None]
CACHE = "cache"  # folder in the output: features, and every fit as far as it got


class TaskFolders(NamedTuple):
    """One task's images. ``val`` is cut from the training folder where the user gave none."""

    train: ImageFolder
    val: ImageFolder
    test: ImageFolder
    class_names: list[str]

    def __str__(self) -> str:
        sizes = f"{len(self.train)} + {len(self.val)} + {len(self.test)} images"
        ignored = sum({s.root: s.ignored for s in self[:3]}.values())
        more = f"; {ignored} other files ignored" if ignored else ""
        return f"{sizes} (train, validation, test) of {len(self.class_names)} classes{more}"


def run(config: TrainConfig, say: Say) -> str:
    """Check everything, train, evaluate and write; resumes what an interrupted run left.

    Args:
        say: told, line by line, what is about to happen.

    Returns:
        The report's table and verdict, what was written and how to load it.

    Raises:
        ValueError: everything that is wrong with model, checkpoints and image folders, before any
            image is encoded; later, an image that cannot be decoded, by name.
        OSError: the output folder cannot be written, before any image is encoded; later, the disk
            is full or the like.
    """
    started = time.perf_counter()
    tasks, experts = open_inputs(config)
    for task, folders in tasks.items():
        say(f"task {task}: {folders}")
    clip, pool = build(config, experts)
    say(str(pool))
    make_writable_folder(config.output / CACHE)
    loaders = _Loaders(config, tasks, clip)
    engine = _engine(config, tasks, clip, pool)
    report = _fit_and_evaluate(engine, config, loaders, clip)
    report.seconds = time.perf_counter() - started
    report.settings["class_names"] = {task: f.class_names for task, f in tasks.items()}
    code = write_results(
        engine,
        report,
        clip.state_dict,
        config.output,
        model_name=clip.name,
        model_config=clip.config,
        preprocess=clip.preprocess_changes,
        batchnorm=config.evaluate.batchnorm,
        calibration=loaders.calibration(),
    )
    files = "report.json, report.txt, figures, merged_<task>.safetensors, engine/"
    for warning in guesses(report):
        say(f"warning: {warning}")
    return f"{rendered(report)}\nwritten to {config.output}: {files}\nto load a merge:\n\n{code}"


def guesses(report: Report) -> Iterator[str]:
    """Tasks on which experts are no better than guessing, in words: within three standard errors of
    it, of their own expert where it is known, else of the ensemble."""
    known = "expert" in report.accuracy
    row, who = ("expert", "its own expert is") if known else ("ensemble", "experts are")
    for task in report.tasks:
        classes = len(report.settings["class_names"][task])
        images = report.settings["samples"][task]
        chance, right = 1 / classes, report.accuracy[row][task] / 100
        if classes > 1 and right <= chance + 3 * math.sqrt(chance * (1 - chance) / images):
            yield (
                f"task {task}: {who} right on {100 * right:.1f} % of {images} images, and guessing "
                f"among {classes} classes on {100 * chance:.1f} %: are they the right experts, "
                "class names and preprocessing?"
            )


# -- before any work ---------------------------------------------------------------------------


def open_inputs(config: TrainConfig) -> tuple[dict[str, TaskFolders], dict[str, Expert]]:
    """Scan the image folders and read the experts' checkpoints.

    Raises:
        OSError: a file that may not be read.
        ValueError: all faults of model, tag, folders, class names, experts' names and checkpoints.
    """
    faults = list(clip_faults(config.model, config.pretrained))
    tasks = {}
    for task, settings in config.tasks.items():
        place = f"tasks.{task}"
        if settings.expert is not None and settings.expert not in config.experts:
            hint = did_you_mean(settings.expert, config.experts)
            faults.append(f"{place}.expert: there is no expert {settings.expert!r}{hint}")
        found = _open_task(settings, config, place, faults)
        if found is not None:
            tasks[task] = found
    experts = {}
    for name, path in config.experts.items():
        try:
            experts[name] = read_expert(path)
        except ValueError as error:
            faults.append(f"experts.{name}: {error}")
    raise_all(config.source, faults)
    return tasks, experts


def _open_task(
    settings: TaskConfig, config: TrainConfig, place: str, faults: list[str]
) -> TaskFolders | None:
    """The task's folders, or None and what is wrong with them added to ``faults``."""
    before = len(faults)
    splits: dict[str, ImageFolder] = {}
    for key in ("train", "val", "test"):
        root = getattr(settings, key)
        if root is None:
            continue
        try:
            splits[key] = image_folder.scan(root)
        except ValueError as error:
            faults.append(f"{place}.{key}: {error}")
            continue
        found = [image_folder.unreadable(splits[key])]
        if "train" in splits:
            found.append(image_folder.difference(splits[key], splits["train"]))
        faults += [f"{place}.{key}: {fault}" for fault in found if fault]
    if len(faults) > before:
        return None
    try:
        names = image_folder.named(splits["train"].classes, settings.class_names)
    except ValueError as error:
        faults.append(f"{place}.class_names: {error}")
        return None
    if "val" not in splits:
        fit = config.fit
        try:
            rest, aside = image_folder.split(splits["train"], fit.validation, fit.seed)
        except ValueError as error:
            faults.append(f"{place}.train: {error}")
            return None
        splits |= {"train": rest, "val": aside}
    return TaskFolders(splits["train"], splits["val"], splits["test"], names)


def build(config: TrainConfig, experts: dict[str, Expert]) -> tuple[ClipModel, ExpertPool]:
    """The CLIP model with its text tower, and the experts' image towers as a pool.

    Raises:
        OSError, ValueError: weights that cannot be read or do not fit, every mismatch.
    """
    tower = {} if config.pretrained is not None else common_text_tower(experts)
    preprocess = config.preprocess.model_dump(exclude_none=True)
    clip = build_clip(config.model, config.pretrained, tower, preprocess)
    template = clip.module.to(config.device).visual
    found = {name: foreign(expert, template) for name, expert in experts.items()}
    faults = [
        f"experts.{name}: {config.experts[name]} is {why}" for name, why in found.items() if why
    ]
    raise_all(config.source, faults)
    pool = ExpertPool(
        [expert.visual for expert in experts.values()],
        template=template,
        names=list(experts),
        dtype=torch.float32,
        device=config.device,
        consume=True,
    )
    policy, modes = config.evaluate.batchnorm, config.evaluate.modes or ()
    raise_all("evaluate", policy_faults(pool, policy, per_sample="per_sample" in modes))
    return clip, pool


# -- the work ----------------------------------------------------------------------------------


class _Loaders:
    """The tasks' images as the engine takes them."""

    def __init__(self, config: TrainConfig, tasks: dict[str, TaskFolders], clip: ClipModel) -> None:
        self._config, self._tasks, self._clip = config, tasks, clip

    def training(self) -> dict[str, ImageLoader]:
        """With ``fit.views`` > 1 passes 1, 2, ... are augmented by open_clip's own transform."""
        views = self._config.fit.views
        augment = self._clip.transform(augment=True) if views > 1 else None
        return {task: self._load(folders.train, augment) for task, folders in self._tasks.items()}

    def plain(self, split: str) -> dict[str, ImageLoader]:
        """The deterministic transform; ``split`` is a field of :class:`TaskFolders`."""
        return {task: self._load(getattr(f, split)) for task, f in self._tasks.items()}

    def calibration(self) -> dict[str, ImageLoader] | None:
        """What BatchNorm is re-estimated on, where that is the policy: the training images."""
        return self.plain("train") if self._config.evaluate.batchnorm == "re_estimate" else None

    def _load(self, folder: ImageFolder, augment: Transform | None = None) -> ImageLoader:
        config = self._config
        dataset = ImageDataset(folder, self._clip.transform(), augment, config.fit.seed)
        views = 1 if augment is None else config.fit.views
        return ImageLoader(dataset, config.batch_size, config.workers, views)


def _engine(
    config: TrainConfig, tasks: dict[str, TaskFolders], clip: ClipModel, pool: ExpertPool
) -> NeuLig:
    heads = {
        task: zero_shot_head(
            clip.module, clip.tokenizer, folders.class_names, config.tasks[task].templates
        )
        for task, folders in tasks.items()
    }
    fit = config.fit
    return NeuLig(
        pool,
        heads,
        fit.alignment,
        fit.boosting,
        fit.scaling,
        fit.seed,
        cache_folder=config.output / CACHE,
    )


def _fit_and_evaluate(
    engine: NeuLig, config: TrainConfig, loaders: _Loaders, clip: ClipModel
) -> Report:
    fit = config.fit
    engine.fit(
        loaders.training(),
        fit.epochs,
        fit.lr,
        fit.batch_size,
        validation=loaders.plain("val"),
        patience=fit.patience,
        starts=fit.starts,
        views=fit.views,
        checkpoint=config.output / CACHE,
    )
    visual = clip.module.visual.state_dict()
    try:
        report = engine.evaluate(
            loaders.plain("test"),
            config.evaluate.modes,
            pretrained=None if config.pretrained is None else visual,
            own=_own_experts(config),
            batchnorm=config.evaluate.batchnorm,
            calibration=loaders.calibration(),
        )
    finally:
        engine.cache.flush()  # the test images' features, also when interrupted
    report.settings["transform"] = "open_clip's for evaluation, deterministic"
    report.settings["config"] = config.model_dump(mode="json")
    return report


def _own_experts(config: TrainConfig) -> dict[str, str] | None:
    """Task -> its expert: the one it names, or the one of its name; None unless all have one."""
    own = {task: settings.expert or task for task, settings in config.tasks.items()}
    return own if set(own.values()) <= set(config.experts) else None
