"""The files that a finished run leaves: report, figures, merged models that open_clip loads."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from torch import Tensor

from ._checks import raise_all, shape
from .state_files import write_json, write_safetensors, write_text

if TYPE_CHECKING:
    from .neulig import NeuLig, Report

VISUAL = "visual."  # prefix of the image tower in a CLIP state dict
_WIDTH = 120  # columns of report.txt
# open_clip's preprocessing settings, and the arguments by which its loaders take them.
_LOADER_ARGUMENTS = {
    "mean": "image_mean",
    "std": "image_std",
    "interpolation": "image_interpolation",
    "resize_mode": "image_resize_mode",
}


def write_results(
    engine: NeuLig,
    report: Report,
    clip_state_dict: Mapping[str, Tensor],
    folder: str | Path,
    *,
    model_name: str = "",
    model_config: str | Path | None = None,
    preprocess: Mapping[str, Any] | None = None,
    batchnorm: str = "blend",
    calibration: Mapping[str, Iterable[Any]] | None = None,
) -> str:
    """Write everything worth keeping of a finished run into ``folder``.

    ``merged_<task>.safetensors``   a whole CLIP per task: ``clip_state_dict`` with the experts
                                    merged by the task's calibration vector as its image tower
    ``<model>.json``                open_clip's config, where the model is not one it knows
    ``report.json``                 the report's numbers
    ``report.txt``                  its table and verdict
    ``*.png``                       its figures
    ``engine/``                     the engine, for ``NeuLig.load``; holds a copy of the experts

    Args:
        engine: fitted; its experts are image towers.
        clip_state_dict: state dict of a whole CLIP model; the merged files keep its dtypes.
        model_name: of a model that open_clip knows.
        model_config: instead, the JSON file of one that it does not; may lie in ``folder``. The
            model's name is the file's.
        preprocess: ``mean``, ``std``, ``interpolation``, ``resize_mode``, as far as they differ
            from what open_clip takes by default.
        batchnorm, calibration: policy of the merges, and task -> loader to re-estimate on.

    Returns:
        The Python that loads a merged model, ready to be printed.

    Raises:
        ValueError: ``clip_state_dict`` is not of the experts' architecture; every mismatch named.
        OSError: the disk is full or the like; no file but a figure is left half written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for task in engine.heads:
        loader = None if calibration is None else calibration[task]
        merged = engine.merge("dataset", loader, task, batchnorm=batchnorm)
        paths[task] = folder / f"merged_{task}.safetensors"
        write_safetensors(paths[task], with_visual(clip_state_dict, merged), {"format": "pt"})
    config = None
    if model_config is not None:
        config = folder / Path(model_config).name
        write_json(config, json.loads(Path(model_config).read_text(encoding="utf-8")))
    report.to_json(folder / "report.json")
    write_text(folder / "report.txt", rendered(report))
    report.plot(folder)
    engine.save(folder / "engine")
    name = model_name if config is None else config.stem
    return loading_code(next(iter(paths.values())), name, config, preprocess)


def with_visual(clip: Mapping[str, Tensor], visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The CLIP state dict ``clip`` with another image tower, in ``clip``'s dtypes.

    Raises:
        ValueError: tensors of the tower that ``clip`` lacks, lacks of the tower, other shapes.
    """
    raise_all("clip_state_dict", _tower_faults(clip, visual))
    tower = {f"{VISUAL}{name}": tensor for name, tensor in visual.items()}
    return {
        name: tower[name].to(tensor.dtype) if name in tower else tensor
        for name, tensor in clip.items()
    }


def _tower_faults(clip: Mapping[str, Tensor], visual: Mapping[str, Tensor]) -> Iterable[str]:
    for name, tensor in visual.items():
        there = clip.get(f"{VISUAL}{name}")
        if there is None:
            yield f"lacks {VISUAL}{name}, which the experts have"
        elif there.shape != tensor.shape:
            yield f"{VISUAL}{name} must be {shape(tensor)} as in the experts, got {shape(there)}"
    for name in clip:
        if name.startswith(VISUAL) and name.removeprefix(VISUAL) not in visual:
            yield f"has {name}, which the experts lack"


def rendered(report: RenderableType) -> str:
    """What rich can show, such as a report's table and verdict, as plain text."""
    text = io.StringIO()
    Console(file=text, width=_WIDTH).print(report)
    return text.getvalue()


def loading_code(
    checkpoint: Path,
    model_name: str,
    model_config: Path | None = None,
    preprocess: Mapping[str, Any] | None = None,
) -> str:
    """Python that makes open_clip load ``checkpoint``, with its preprocessing."""
    lines = ["import open_clip"]
    if model_config is not None:
        lines.append(f"open_clip.add_model_config({str(model_config)!r})")
    arguments = [repr(model_name), f"pretrained={str(checkpoint)!r}"]
    for key, value in (preprocess or {}).items():
        arguments.append(f"{_LOADER_ARGUMENTS[key]}={value!r}")
    call = f"open_clip.create_model_and_transforms({', '.join(arguments)})"
    return "\n".join((*lines, f"model, _, preprocess = {call}"))
