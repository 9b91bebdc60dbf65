"""``nf.merge``: a recipe and folders of weights in, a folder of weights out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .companions import all_companions
from .counter import Counter
from .folders import Folders, State, check_space
from .forecast import Forecast, forecast, passes
from .inputs import check
from .manifest import Manifest, checksum
from .pipeline import Job, Pipeline
from .prepared import Prepared, prepare
from .ranks import Ranks, torchrun
from .read import Reader
from .report import MergeReport, OutputReport
from .resources import Resources, Size, asked_for, capped, check_memory, for_tensors, notes
from .survey import Survey
from .whole import known
from .write import Staging

_LONG = 1 << 30  # bytes; less is merged about as soon as rates are measured


def merge(
    config: str | Path | Mapping[str, Any],
    out_dir: str | Path,
    *,
    max_ram: Size = "2G",
    shard_size: Size = "5G",
    device: str = "auto",
    max_vram: Size | None = None,
    threads: int | None = None,
    seed: int = 0,
    resume: bool = True,
    check_inputs: bool = False,
    progress: Callable[[int, int], Any] | None = None,
    foreseen: Callable[[Forecast], Any] | None = None,
    distributed: bool = False,
) -> MergeReport:
    """Merge checkpoints as a recipe says and write the result as a checkpoint, or several results.

    Everything that headers tell is checked before a weight is read. Weights pass through buffers
    of a fixed size, whatever the models' sizes. An interrupted merge goes on where it was; until a
    merge has ended, the folder holds what it held before.

    Args:
        config: a YAML file, or its content. mergekit's files are taken as they are (docs/merge.md).
        out_dir: a folder that is empty, missing or holds an earlier merge, which is replaced. Of a
            recipe with several results each has such a folder below it.
        max_ram: the most memory above that of a bare ``import torch``: bytes, or such as "512M".
        shard_size: of each file of weights, at most.
        device: ``auto``, ``cpu``, ``cuda`` (all GPUs), ``cuda:1`` or ``cuda:0,cuda:2``: where
            tensors are merged. Threads are dealt round to several GPUs.
        max_vram: the most memory on each GPU; by default four fifths of what is free.
        threads: that read, merge and write; by default as many as torch uses, or as there is
            memory for.
        seed: of methods that drop elements at random.
        resume: go on with an interrupted merge of the same; else begin anew.
        check_inputs: read all inputs first whose checksums are known, and compare: earlier merges
            and downloads from Hugging Face.
        progress: told of bytes done and of all bytes, from any thread.
        foreseen: told before the work, if there is more than a GiB of it, what will bound it; its
            rates take a second to measure.
        distributed: all processes that torchrun has started share the work, on files that all of
            them see; each must call this. ``max_ram`` and ``threads`` are of one process.

    Raises:
        ValueError: everything that is wrong with recipe, models, options or folder; a file that
            changes while it is read, or differs from its checksum (``check_inputs``).
        RuntimeError: another process failed.
        OSError: no such file; the disk is full or the like. The old result is untouched.
    """
    started = time.perf_counter()
    out_dir = Path(out_dir)
    with torchrun() if distributed else contextlib.nullcontext(Ranks()) as ranks:
        prepared = ranks.here(lambda: prepare(config, shard_size=shard_size, seed=seed))
        texts = ranks.here(lambda: all_companions(prepared, out_dir))
        _agree(prepared, ranks)
        limits = (max_ram, ranks.device(device), threads, max_vram)
        resources = ranks.here(lambda: _resources(prepared, *limits))
        unchecked = _checked(prepared, progress, ranks) if check_inputs else []
        stagings = {
            one.name: Staging(out_dir / one.name, one.plan.layout, one.identity())
            for one in prepared
        }
        with contextlib.closing(Folders(out_dir, stagings)) as folders:
            _begin(folders, resume, ranks)
            if foreseen is not None and ranks.first:
                _foresee(prepared, out_dir, resources, foreseen)
            outputs = {one.name: _output(one, stagings[one.name], folders) for one in prepared}
            todo = [one for one in prepared if one.name not in folders.complete]
            moved = _run(todo, folders, resources, progress, ranks)
            ranks.all(lambda: _finish(todo, texts, folders) if ranks.first else None)
    planned = (text for one in prepared for text in one.plan.warnings)
    warned = [*unchecked, *notes(resources), *planned, *folders.warnings]
    return _report(out_dir, started, moved, outputs, warned)


def _report(
    out_dir: Path,
    started: float,
    moved: tuple[int, int],
    outputs: Mapping[str, OutputReport],
    warnings: Sequence[str],
) -> MergeReport:
    return MergeReport(
        out_dir,
        time.perf_counter() - started,
        *moved,
        sum(output.tensors for output in outputs.values()),
        sum(output.resumed for output in outputs.values()),
        tuple(dict.fromkeys(warnings)),
        {} if "" in outputs else outputs,
    )


def _agree(prepared: Sequence[Prepared], ranks: Ranks) -> None:
    """ValueError, in every process, if they were given different things to do."""
    plans = ranks.all(lambda: [(one.name, one.record(), one.layout()) for one in prepared])
    others = [str(rank) for rank, plan in enumerate(plans) if plan != plans[0]]
    if others:
        raise ValueError(
            f"merge: processes {', '.join(others)} have another recipe, seed or other models than "
            "process 0: all must see the same files"
        )


def _checked(
    prepared: Sequence[Prepared], progress: Callable[[int, int], Any] | None, ranks: Ranks
) -> list[str]:
    """Of inputs, by one process; which could not be."""
    models = prepared[0].models.values()
    return ranks.all(lambda: check(models, progress) if ranks.first else [])[0]


def _begin(folders: Folders, resume: bool, ranks: Ranks) -> None:
    def begin() -> State | None:
        if ranks.first:
            folders.begin(resume)
        return folders.state() if ranks.first else None

    begun = ranks.all(begin)[0]
    if begun is not None and not ranks.first:
        folders.join(begun, ranks.rank)


def foresee(
    config: str | Path,
    out_dir: str | Path,
    *,
    max_ram: Size = "2G",
    shard_size: Size = "5G",
    device: str = "auto",
    max_vram: Size | None = None,
    threads: int | None = None,
    check_inputs: bool = False,
    progress: Callable[[int, int], Any] | None = None,
) -> Forecast:
    """What :func:`merge` would do with these arguments: all its checks, and how long it takes."""
    prepared = prepare(config, shard_size=shard_size)
    all_companions(prepared, Path(out_dir))
    check_space(Path(out_dir), {one.name: one.plan.layout for one in prepared})
    resources = _resources(prepared, max_ram, device, threads, max_vram)
    unchecked = check(prepared[0].models.values(), progress) if check_inputs else []
    found = forecast([one.plan for one in prepared], Path(out_dir), resources)
    warnings = [
        *unchecked,
        *notes(resources),
        *(text for one in prepared for text in one.plan.warnings),
    ]
    return found._replace(warnings=tuple(dict.fromkeys(warnings)))


def _resources(
    prepared: Sequence[Prepared],
    max_ram: Size,
    device: str,
    threads: int | None,
    max_vram: Size | None,
) -> Resources:
    """What may be used, which is enough."""
    tensors = [tensor for one in prepared for tensor in one.plan.tensors]
    found = asked_for(max_ram, device, threads, max_vram)
    found = for_tensors(tensors, found, fewer=threads is None)
    check_memory(tensors, found)
    return found


def _foresee(
    prepared: Sequence[Prepared], out_dir: Path, resources: Resources, told: Callable[..., Any]
) -> None:
    plans = [one.plan for one in prepared]
    if plans[0].bytes_in + sum(plan.layout.bytes for plan in plans) > _LONG:
        told(forecast(plans, out_dir, resources))


def _output(prepared: Prepared, staging: Staging, folders: Folders) -> OutputReport:
    tensors = len(prepared.plan.tensors)
    resumed = sum(planned.is_in(staging.sums) for planned in prepared.plan.tensors)
    resumed = tensors if prepared.name in folders.complete else resumed
    return OutputReport(staging.folder, tensors, resumed)


def _run(
    todo: Sequence[Prepared],
    folders: Folders,
    resources: Resources,
    progress: Callable[[int, int], Any] | None,
    ranks: Ranks,
) -> tuple[int, int]:
    """Merge what is missing, by all processes; bytes that were read and written."""
    if not todo:
        return 0, 0
    stagings = [folders.stagings[one.name] for one in todo]
    with Reader() as reader, capped(resources):
        pipeline = Pipeline(todo[0].plan.method, reader, stagings, resources)
        every: Sequence[Job] = list(zip(*(one.plan.tensors for one in todo), strict=True))
        jobs = [job for job in every if pipeline.missing(job)]
        bytes_in = sum(job[0].bytes for job in jobs)
        bytes_out = sum(p.bytes_out for job in jobs for _, p in pipeline.missing(job))
        ahead = _ahead(todo) if jobs else 0
        counter = Counter((ahead + bytes_in + bytes_out) // ranks.count, progress)
        pipeline.advance = counter
        if jobs:
            every, read = _surveyed(todo, pipeline, every, ranks)
            jobs, bytes_in = [job for job in every if pipeline.missing(job)], bytes_in + read
            counter.total += (read - ahead) // ranks.count  # some models ask for more passes

        def work() -> list[dict[str, str]]:
            pipeline.run(ranks.part(jobs))
            if not ranks.first:
                for staging in stagings:
                    staging.sync()
            return [staging.sums for staging in stagings]

        for found in ranks.all(work):
            for staging, sums in zip(stagings, found, strict=True):
                staging.sums.update(sums)
    return bytes_in, bytes_out


def _ahead(todo: Sequence[Prepared]) -> int:
    """Bytes that are read before anything is merged."""
    plans = [one.plan for one in todo]
    return 0 if plans[0].whole is None else passes(plans) * plans[0].whole.bytes


def _surveyed(
    todo: Sequence[Prepared], pipeline: Pipeline, jobs: Sequence[Job], ranks: Ranks
) -> tuple[Sequence[Job], int]:
    """Jobs that know what their method wants to know of the whole model, and bytes read for it."""
    wholes = [one.plan.whole for one in todo if one.plan.whole is not None]
    if not wholes:
        return jobs, 0
    survey = Survey(pipeline, jobs, wholes[0].places, ranks)
    return known(pipeline.method, wholes, jobs, survey.look), survey.bytes


def _finish(
    todo: Sequence[Prepared], texts: Mapping[str, Mapping[str, bytes]], folders: Folders
) -> None:
    for one in todo:
        _commit(one, texts[one.name], folders)
    folders.finish()


def _commit(prepared: Prepared, texts: Mapping[str, bytes], folders: Folders) -> None:
    from .. import __version__  # late: the package imports this module

    plan, staging = prepared.plan, folders.stagings[prepared.name]
    files = {n: {"bytes": len(text), "xxh3": checksum(text)} for n, text in texts.items()}
    for shard in plan.layout.shards:
        files[shard.name] = {"bytes": shard.bytes, "xxh3": checksum(shard.header)}
    places = plan.layout.places
    tensors = {
        name: {"file": places[name].file, "xxh3": text} for name, text in staging.sums.items()
    }
    manifest = Manifest(__version__, prepared.record(), files, tensors)
    folders.commit(prepared.name, manifest, texts)
