"""``nf.merge``: a recipe and folders of weights in, a folder of weights out."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from .. import config_files
from .._checks import raise_all
from ..methods import METHODS
from . import recipe_file, sizes
from .companions import companions
from .forecast import Forecast, forecast
from .headers import INDEX, Checkpoint
from .hub import open_models
from .manifest import Manifest, checksum
from .pieces import models_beside
from .pipeline import Pipeline, Resources
from .plan import Plan, make_plan
from .read import Reader
from .recipe import ModelRef, Recipe
from .write import Staging

Size = int | str
_OVERHEAD = 64 << 20  # bytes of the ceiling for everything but buffers


class MergeReport(NamedTuple):
    """How a merge went.

    Attributes:
        folder: of the result.
        seconds: from the first check to the last file in its place.
        bytes_in, bytes_out: read and written in this run.
        tensors: of the result.
        resumed: of them, those that an interrupted run had already written.
        warnings: what is worth knowing, in words.
    """

    folder: Path
    seconds: float
    bytes_in: int
    bytes_out: int
    tensors: int
    resumed: int
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        rate = (self.bytes_in + self.bytes_out) / max(self.seconds, 1e-9)
        lines = [*(f"warning: {text}" for text in self.warnings)]
        again = f", {self.resumed} of them from an interrupted run" if self.resumed else ""
        lines.append(f"{self.folder}: {self.tensors} tensors{again}")
        lines.append(
            f"{sizes.text(self.bytes_in)} read, {sizes.text(self.bytes_out)} written in "
            f"{self.seconds:.1f} s: {sizes.text(round(rate))}/s"
        )
        return "\n".join(lines)


class Prepared(NamedTuple):
    """A merge of which everything is known but the weights."""

    recipe: Recipe
    source: bytes
    models: Mapping[ModelRef, Checkpoint]
    plan: Plan


def merge(
    config: str | Path | Mapping[str, Any],
    out_dir: str | Path,
    *,
    max_ram: Size = "2G",
    shard_size: Size = "5G",
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    resume: bool = True,
    progress: Callable[[int, int], Any] | None = None,
) -> MergeReport:
    """Merge checkpoints as a recipe says and write the result as a checkpoint.

    Everything that headers tell is checked before a weight is read. Weights pass through buffers
    of a fixed size, whatever the models' sizes. An interrupted merge goes on where it was; until a
    merge has ended, the folder holds what it held before.

    Args:
        config: a YAML file, or its content. mergekit's files are taken as they are (docs/merge.md).
        out_dir: a folder that is empty, missing or holds an earlier merge, which is replaced.
        max_ram: the most memory above that of a bare ``import torch``: bytes, or such as "512M".
        shard_size: of each file of weights, at most.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``: where tensors are merged.
        threads: that read, merge and write; by default as many as torch uses.
        seed: of methods that drop elements at random.
        resume: go on with an interrupted merge of the same; else begin anew.
        progress: told of bytes done and of all bytes, from any thread.

    Raises:
        ValueError: everything that is wrong with recipe, models, options or folder; a file that
            changes while it is read.
        OSError: no such file; the disk is full or the like. The old result is untouched.
    """
    started = time.perf_counter()
    out_dir = Path(out_dir)
    prepared = prepare(config, shard_size=shard_size, seed=seed)
    resources = _resources(max_ram, device, threads)
    record = _record(prepared, seed)
    staging = Staging(out_dir, prepared.plan.layout, _identity(prepared, record))
    _check_space(out_dir, prepared.plan)
    tensors = prepared.plan.tensors
    with contextlib.closing(staging):
        staging.begin(resume)
        resumed = len(staging.sums)
        todo = [tensor for tensor in tensors if tensor.output.name not in staging.sums]
        bytes_in = sum(tensor.bytes for tensor in todo)
        bytes_out = sum(tensor.output.bytes for tensor in todo)
        _run(prepared.plan, todo, staging, resources, _counter(bytes_in + bytes_out, progress))
        _commit(prepared, record, staging)
    seconds = time.perf_counter() - started
    return MergeReport(
        out_dir, seconds, bytes_in, bytes_out, len(tensors), resumed, prepared.plan.warnings
    )


def prepare(
    config: str | Path | Mapping[str, Any], *, shard_size: Size = "5G", seed: int = 0
) -> Prepared:
    """All checks of :func:`merge` that need no weights.

    Raises:
        ValueError: everything that is wrong.
        OSError: no such recipe.
    """
    content, source, base = _read(config)
    recipe = recipe_file.parse(content, METHODS)
    method = METHODS[recipe.method]
    models = open_models([*recipe.models(), *models_beside(recipe, method)], base)
    plan = make_plan(recipe, method, models, sizes.parse("shard_size", shard_size), seed)
    return Prepared(recipe, source, models, plan)


@contextlib.contextmanager
def progress_bar(quiet: bool = False) -> Iterator[Callable[[int, int], Any] | None]:
    """A bar on stderr: share and rate of bytes, time left. Gives what :func:`merge` tells."""
    if quiet:
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        *(TextColumn("merging"), BarColumn(), DownloadColumn(binary_units=True)),
        *(TransferSpeedColumn(), TimeRemainingColumn()),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def foresee(
    config: str | Path,
    out_dir: str | Path,
    *,
    max_ram: Size = "2G",
    shard_size: Size = "5G",
    device: str = "auto",
    threads: int | None = None,
) -> Forecast:
    """What :func:`merge` would do with these arguments: all its checks, and how long it takes."""
    prepared = prepare(config, shard_size=shard_size)
    _check_space(Path(out_dir), prepared.plan)
    resources = _resources(max_ram, device, threads)
    return forecast(prepared.plan, Path(out_dir), resources, _OVERHEAD)


def _read(config: str | Path | Mapping[str, Any]) -> tuple[Any, bytes, Path]:
    if isinstance(config, Mapping):
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        return config, text.encode(), Path()
    path = Path(config)
    return config_files.read(path), path.read_bytes(), path.resolve().parent


def _resources(max_ram: Size, device: str, threads: int | None) -> Resources:
    memory = sizes.parse("max_ram", max_ram)
    faults = []
    if memory < 2 * _OVERHEAD:
        faults.append(f"max_ram must be at least {sizes.text(2 * _OVERHEAD)}, got {max_ram!r}")
    if threads is not None and threads < 1:
        faults.append(f"threads must be 1 or more, got {threads}")
    raise_all("merge", faults)
    found = torch.device(config_files.usable_device(device))
    return Resources(threads or torch.get_num_threads(), memory - _OVERHEAD, found)


def _check_space(folder: Path, plan: Plan) -> None:
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, needed = shutil.disk_usage(nearest).free, plan.layout.bytes
    reserved = sum(path.stat().st_blocks * 512 for path in folder.glob(".merging/*.safetensors"))
    if free + reserved < needed:
        raise OSError(
            f"{folder}: the result has {sizes.text(needed)}, the disk has {sizes.text(free)} free"
        )


def _record(prepared: Prepared, seed: int) -> dict[str, Any]:
    """What the result is made from, for its manifest: the same on every machine."""
    models = {
        str(model): {file.name: file.stat().st_size for file in checkpoint.files}
        for model, checkpoint in prepared.models.items()
    }
    method = prepared.recipe.method
    return {"method": method, "models": models, "seed": seed, "xxh3": checksum(prepared.source)}


def _identity(prepared: Prepared, record: dict[str, Any]) -> dict[str, Any]:
    """What tells merges apart here: the layout, and that no input has changed meanwhile."""
    headers = b"".join(shard.header for shard in prepared.plan.layout.shards)
    changed = [file.stat().st_mtime_ns for c in prepared.models.values() for file in c.files]
    return {**record, "layout": checksum(headers), "times of the models' files": changed}


def _counter(total: int, progress: Callable[[int, int], Any] | None) -> Callable[[int], Any]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    return advance


def _run(
    plan: Plan,
    todo: list[Any],
    staging: Staging,
    resources: Resources,
    advance: Callable[[int], Any],
) -> None:
    with Reader() as reader:
        pipeline = Pipeline(plan.method, reader, [staging], resources, advance)
        pipeline.run([(tensor,) for tensor in todo])


def _commit(prepared: Prepared, record: dict[str, Any], staging: Staging) -> None:
    from .. import __version__  # late: the package imports this module

    plan = prepared.plan
    folders = {model: checkpoint.path for model, checkpoint in prepared.models.items()}
    texts = companions(prepared.recipe, prepared.source, plan, folders)
    index = plan.layout.index_text()
    if index is not None:
        texts[INDEX] = index.encode()
    files = {n: {"bytes": len(text), "xxh3": checksum(text)} for n, text in texts.items()}
    for shard in plan.layout.shards:
        files[shard.name] = {"bytes": shard.bytes, "xxh3": checksum(shard.header)}
    places = plan.layout.places
    tensors = {
        name: {"file": places[name].file, "xxh3": text} for name, text in staging.sums.items()
    }
    manifest = Manifest(__version__, record, files, tensors)
    staging.commit(manifest, texts)
