"""The demo from nothing to a report: data, one origin, five experts, NeuLig, evaluation, files."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from open_clip import CLIP
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from ..neulig import Head, NeuLig, Report, zero_shot_head
from ..neulig.report import compare
from ..outputs import write_results
from ..pool import ExpertPool
from . import clip, tasks, training
from .settings import DemoSettings
from .tasks import TASK_NAMES, TaskData

_FILES = (
    "\nreport.json and report.txt tell of the default setting, as do merged_<task>.safetensors and "
    "engine/, which are its models; report_published.json of the published one, the paper's "
    "alignment offset_sum. tasks.png shows images of every task; the other figures show what the "
    "report says."
)
# The engine's default and the published setting, in the order they are shown. The first one's
# report and models are the demo's result.
ALIGNMENTS = {"variance": "default (variance)", "offset_sum": "published (offset_sum)"}


@dataclass
class Stages:
    """Seconds per stage, and one progress bar for whatever is running."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """Time a stage and show its bar; leave a line behind when it is done."""
        columns = (TextColumn("{task.description:<28}"), BarColumn(), TimeElapsedColumn())
        started = time.perf_counter()
        quiet = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=quiet) as bars:
            yield bars
        self.seconds[name] = time.perf_counter() - started
        self.console.print(f"[green]✓[/green] {name:<44} {self.seconds[name]:6.1f} s")


def run(folder: Path, settings: DemoSettings, console: Console) -> dict[str, Report]:
    """Make the experts, merge them in both settings, write everything under ``folder``.

    Returns:
        The reports by alignment, the engine's default first.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stages = Stages(console)
    origin, heads, train, experts = make_experts(settings, stages)
    pool = ExpertPool(
        list(experts.values()), template=origin.visual, names=TASK_NAMES, consume=True
    )
    engines = _fit(pool, heads, train, settings, stages)
    pretrained = {name: t.clone() for name, t in origin.visual.state_dict().items()}
    with stages.stage("evaluation on the test split"):
        test = {
            name: _batches(data, len(data.labels)) for name, data in _draw(settings, "test").items()
        }
        reports = {
            alignment: engine.evaluate(test, pretrained=pretrained, progress=False)
            for alignment, engine in engines.items()
        }
    best = next(iter(reports.values()))
    best.seconds = sum(stages.seconds.values())
    best.settings["demo"] = {**asdict(settings), "stage_seconds": stages.seconds}
    tasks.contact_sheet(list(_draw(settings, "test").values()), folder / "tasks.png")
    config = clip.write_config(folder, settings)
    closing = write_results(
        next(iter(engines.values())), best, origin.state_dict(), folder, model_config=config
    )
    reports["offset_sum"].to_json(folder / "report_published.json")
    _show(reports, closing, folder, console)
    return reports


class Made(NamedTuple):
    """What the demo makes before anything is merged; all but ``origin`` by task."""

    origin: CLIP  # pre-trained; its image tower is what the experts started from
    heads: dict[str, Head]
    train: dict[str, TaskData]
    experts: dict[str, dict[str, Tensor]]  # state dicts of image towers


def make_experts(settings: DemoSettings, stages: Stages) -> Made:
    """Pre-train one CLIP, make its text heads and fine-tune one image tower per task."""
    origin = _pretrain(settings, stages)
    with stages.stage("text heads and training images"):
        train, encode = _draw(settings, "train"), clip.tokenizer()
        heads = {
            name: zero_shot_head(origin, encode, data.class_names, data.templates)
            for name, data in train.items()
        }
    return Made(origin, heads, train, _fine_tune(origin, heads, train, settings, stages))


def _pretrain(settings: DemoSettings, stages: Stages) -> CLIP:
    with stages.stage("pre-training one CLIP on plain images") as bars:
        plain = [
            tasks.make_task(
                name,
                style="plain",
                size=settings.plain_per_class * _num_classes(name),
                seed=settings.seed,
            )
            for name in TASK_NAMES
        ]
        bar = bars.add_task("pre-training", total=settings.pretrain_steps)

        def progress(step: int, steps: int, loss: float) -> None:
            bars.update(bar, completed=step, description=f"pre-training, loss {loss:.2f}")

        return training.pretrain(plain, settings, progress)


def _num_classes(name: str) -> int:
    return len(tasks.make_task(name, size=0).class_names)


def _draw(settings: DemoSettings, split: str) -> dict[str, TaskData]:
    sizes = dict.fromkeys(TASK_NAMES, settings.test_size)
    if split == "train":
        sizes = {name: settings.train_per_class * _num_classes(name) for name in TASK_NAMES}
    return {
        name: tasks.make_task(name, split=split, size=size, seed=settings.seed)
        for name, size in sizes.items()
    }


def _fine_tune(
    origin: CLIP,
    heads: Mapping[str, Head],
    train: Mapping[str, TaskData],
    settings: DemoSettings,
    stages: Stages,
) -> dict[str, dict[str, Tensor]]:
    with stages.stage(f"fine-tuning {len(train)} experts") as bars:
        bar_of = {name: bars.add_task(name, total=None) for name in train}

        def progress(name: str, step: int, steps: int, loss: float) -> None:
            text = f"expert {name}, loss {loss:.2f}"
            bars.update(bar_of[name], total=steps, completed=step, description=text)

        weights = {name: head.weight for name, head in heads.items()}
        return training.fine_tune_all(origin.visual, weights, train, settings, progress)


def _batches(data: TaskData, count: int, size: int = 128) -> list[tuple[Tensor, Tensor]]:
    images = tasks.normalise(data.images[:count])
    return list(zip(images.split(size), data.labels[:count].split(size), strict=True))


def _fit(
    pool: ExpertPool,
    heads: Mapping[str, Head],
    train: Mapping[str, TaskData],
    settings: DemoSettings,
    stages: Stages,
) -> dict[str, NeuLig]:
    engines: dict[str, NeuLig] = {}
    count = settings.portland_images
    loaders = {name: _batches(data, count) for name, data in train.items()}
    for alignment, words in ALIGNMENTS.items():
        with stages.stage(f"Portland, {words}"):
            engine = NeuLig(pool, heads, alignment=alignment, seed=settings.seed)
            if engines:  # features depend on the experts and the images alone
                engine.cache = next(iter(engines.values())).cache
            engines[alignment] = engine.fit(
                loaders, epochs=settings.portland_epochs, progress=False
            )
    return engines


def _show(reports: Mapping[str, Report], closing: str, folder: Path, console: Console) -> None:
    best = next(iter(reports.values()))
    console.print()
    console.print(compare({words: reports[name] for name, words in ALIGNMENTS.items()}))
    console.print(best)
    console.print(_FILES, markup=False, highlight=False)
    console.print(f"\nTo load a merged model:\n\n{closing}\n", soft_wrap=True, highlight=False)
    console.print(f"{best.seconds:.0f} s in all. Everything is in {folder}/")
