"""``neulig-fast align``: from a checked configuration to aligned and merged checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import yaml
from rich import box
from rich.console import Group
from rich.table import Table
from torch import Tensor

from . import image_folder
from ._checks import raise_all
from .align_config import ALIGNMENT, MERGED, REPORT, AlignConfig, aligned_file
from .alignment import Alignment, EnsembleLikeness, reestimate_batchnorm, rescale, summary
from .alignment.aligner import Aligner
from .clip_models import Expert
from .encoders.merged_rows import batchnorms
from .image_folder import ImageDataset, ImageFolder, ImageLoader
from .image_models import OPEN_CLIP, ImageModel, library_of
from .outputs import rendered
from .pool import ExpertPool
from .state_files import make_writable_folder, write_json, write_safetensors

Say = Callable[[str], None]
_PYTORCH = {"format": "pt"}  # the metadata by which loaders know the framework


class Finished(NamedTuple):
    """How a run ended.

    Attributes:
        text: the tables, what was written, and how to go on.
        interrupted: Ctrl-C ended the matching early; what was found until then is written.
    """

    text: str
    interrupted: bool


def run(config: AlignConfig, say: Say) -> Finished:
    """Check everything, align, merge and write.

    Args:
        say: told, line by line, what is about to happen.

    Raises:
        ValueError: everything that is wrong with model and images, then with the checkpoints,
            before any image is run; later, an image that cannot be decoded, by name.
        OSError: the output folder cannot be written, before any image is run; later, the disk is
            full or the like.
    """
    started = time.perf_counter()
    images = open_images(config)
    say(f"images: {0 if images is None else len(images)}")
    experts, model = open_models(config)
    aligner = _aligner(config, experts, model, images)
    say(str(aligner.spec))
    make_writable_folder(config.output)
    alignment, likeness = _align(aligner, config)
    if alignment.interrupted:
        say("interrupted: the best matching so far is kept and written")
    files = _write(alignment, aligner, config, experts)
    report = {
        **summary.as_json(alignment),
        **({"likeness": likeness} if likeness else {}),
        "files": files,
        "images": 0 if images is None else len(images),
        "seconds": time.perf_counter() - started,
        "settings": config.model_dump(mode="json"),
    }
    write_json(config.output / REPORT, report)
    tables = rendered(Group(summary.tables(alignment), *_likenesses(alignment, likeness)))
    written = f"written to {config.output}: {', '.join([*files, REPORT])}"
    return Finished(f"{tables}{written}\n{_next_steps(config, model)}", alignment.interrupted)


# -- before any work ---------------------------------------------------------------------------


def open_images(config: AlignConfig) -> ImageFolder | None:
    """The images to run, a random sample of ``max_images``; and all checks that need no weights.

    Raises:
        ValueError: all faults of model and images.
    """
    faults = list(library_of(config.model).faults(config.model))
    images = None
    if config.images is not None:
        try:
            images = image_folder.gather(config.images, config.seed)
        except ValueError as error:
            faults.append(f"images: {error}")
        else:
            images = image_folder.subset(images, range(len(images))[: config.max_images])
            unreadable = image_folder.unreadable(images)
            faults += [f"images: {unreadable}"] if unreadable else []
    raise_all(config.source, faults)
    return images


def open_models(config: AlignConfig) -> tuple[dict[str, Expert], ImageModel]:
    """The experts' checkpoints, and the model that runs their image towers.

    Raises:
        OSError, ValueError: checkpoints that cannot be read or are of something else.
    """
    library = library_of(config.model)
    experts, faults = {}, []
    for name, path in config.experts.items():
        try:
            experts[name] = library.read(path)
        except ValueError as error:
            faults.append(f"experts.{name}: {error}")
    raise_all(config.source, faults)
    model = library.build(config.model, next(iter(experts.values())))
    for name, expert in experts.items():
        why = library.foreign(expert, model.module)
        faults += [f"experts.{name}: {config.experts[name]} is {why}"] if why else []
    raise_all(config.source, faults)
    return experts, model


def _aligner(
    config: AlignConfig,
    experts: dict[str, Expert],
    model: ImageModel,
    images: ImageFolder | None,
) -> Aligner:
    pool = ExpertPool(
        [expert.visual for expert in experts.values()],
        template=model.module.to(config.device),
        names=list(experts),
        dtype=torch.float32,
        device=config.device,
    )
    data = None
    if images is not None:
        dataset = ImageDataset(images, model.transform)
        data = ImageLoader(dataset, config.batch_size, config.workers)
    aligner = Aligner(
        pool, data=data, match=config.match, similarity=config.similarity, progress=True
    )
    raise_all(config.source, _repair_faults(config, aligner))
    return aligner


def _align(aligner: Aligner, config: AlignConfig) -> tuple[Alignment, dict[float, float]]:
    """The alignment, and the likeness to the ensemble of each balance that it was chosen of."""
    loop: dict[str, Any] = {"order": config.order, "seed": config.seed, "sweeps": config.sweeps}
    template, data = aligner.networks.template, aligner.data
    if config.balances is None or template is None or data is None:
        return aligner.align(config.balance, **loop), {}
    likeness = EnsembleLikeness(aligner.networks, template, data)

    def score(merged: Mapping[str, Tensor]) -> float:
        if config.repair == "batchnorm":
            merged = reestimate_batchnorm(merged, template, data)
        return likeness(merged)

    return aligner.choose_balance(score, config.balances, **loop)


def _likenesses(alignment: Alignment, likeness: Mapping[float, float]) -> Iterator[Table]:
    if not likeness:
        return
    table = Table("balance", "likeness of the merge to the ensemble", box=box.SIMPLE_HEAD)
    for balance, cosine in likeness.items():
        chosen = "  chosen" if balance == alignment.balance else ""
        table.add_row(f"{balance:g}", f"{cosine:.4f}{chosen}")
    yield table


def _repair_faults(config: AlignConfig, aligner: Aligner) -> Iterator[str]:
    if config.repair == "batchnorm" and not batchnorms(aligner.networks.template):
        yield f"repair: {config.model} has no BatchNorm; rescale or none fit it"
    if config.repair == "rescale":
        rows = [use.tensor for use in aligner.spec.uses if use.role == "out"]
        if not any(name.endswith("weight") and _bias(name) in aligner.networks[0] for name in rows):
            yield f"repair: rescale needs layers with biases; {config.model} has none to rescale"


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


# -- afterwards --------------------------------------------------------------------------------


def _write(
    alignment: Alignment, aligner: Aligner, config: AlignConfig, experts: dict[str, Expert]
) -> list[str]:
    """Write the matchings, the aligned experts and the merge; names of the files."""
    alignment.save(config.output / ALIGNMENT)
    files = [ALIGNMENT]
    for i, (name, expert) in enumerate(experts.items()):
        if config.match == "align":
            files.append(aligned_file(name))
            aligned = expert.with_visual(alignment.apply(i, expert.visual))
            write_safetensors(config.output / files[-1], aligned, _PYTORCH)
    merged = next(iter(experts.values())).with_visual(_merged(alignment, aligner, config.repair))
    write_safetensors(config.output / MERGED, merged, _PYTORCH)
    return [*files, MERGED]


def _merged(alignment: Alignment, aligner: Aligner, repair: str) -> dict[str, Tensor]:
    merged = alignment.merge()
    template, data = aligner.networks.template, aligner.data
    if repair == "none" or template is None or data is None:
        return merged
    if repair == "batchnorm":
        return reestimate_batchnorm(merged, template, data)
    aligned = [alignment.apply(i) for i in range(alignment.num_networks)]
    return rescale(merged, aligned, template, alignment.spec, data)


def _next_steps(config: AlignConfig, model: ImageModel) -> str:
    lines = ["to load the merge:", "", model.loading_code(config.output / MERGED)]
    if config.match == "align" and library_of(config.model) is OPEN_CLIP:
        lines += ["", "to train a Portland on the aligned experts, give `neulig-fast train`:", ""]
        files = {name: str(config.output / aligned_file(name)) for name in config.experts}
        lines += [yaml.safe_dump({"model": config.model, "experts": files}, sort_keys=False)]
    return "\n".join(lines)
