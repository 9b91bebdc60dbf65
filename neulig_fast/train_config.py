"""CONFIG.yaml of ``neulig-fast train``: what it may hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator

from .config_files import (
    WORKERS,
    Count,
    Device,
    File,
    Folder,
    ModelName,
    Name,
    Output,
    Section,
    Seed,
    Workers,
    as_file,
    as_name,
    load,
    located,
    not_empty,
    one_of,
)
from .neulig.batchnorm import POLICIES
from .neulig.modes import MODES
from .neulig.penalty import ALIGNMENTS
from .ops.neulig_loss import BOOSTING

TEMPLATES = ("a photo of a {}.",)
_RESERVED = ("mean",)
_FILES_OF_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")  # of which no tag has any


def _not_reserved(value: str) -> str:
    if value in _RESERVED:
        raise ValueError(f"the name {value!r} is taken by the report")
    return value


def _template(value: str) -> str:
    if "{}" not in value:
        raise ValueError(f"a template holds {{}} where the class name goes, got {value!r}")
    return value


def _names_by_folder(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {as_name(key): as_name(name) for key, name in value.items()}
    return [as_name(name) for name in value] if isinstance(value, list) else value


ReportName = Annotated[Name, AfterValidator(_not_reserved)]
Template = Annotated[str, AfterValidator(_template)]
Modes = Annotated[tuple[Annotated[str, one_of(*MODES)], ...], AfterValidator(not_empty)]


class TaskConfig(Section):
    """One data set: folders with a sub-folder of images per class."""

    train: Folder
    test: Folder
    val: Folder | None = None
    class_names: Annotated[dict[str, str] | list[str] | None, BeforeValidator(_names_by_folder)] = (
        None
    )
    templates: Annotated[tuple[Template, ...], AfterValidator(not_empty)] = TEMPLATES
    expert: ReportName | None = None


class PreprocessConfig(Section):
    """Where the experts' preprocessing is not what open_clip takes for the model by itself."""

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: Annotated[str, one_of("bicubic", "bilinear")] | None = None
    resize_mode: Annotated[str, one_of("shortest", "longest", "squash")] | None = None


class FitConfig(Section):
    """How the Portland is trained; the arguments of ``NeuLig`` and ``NeuLig.fit``."""

    epochs: Count = 100
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    batch_size: Count = 128
    patience: Count | None = None
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    alignment: Annotated[str, one_of(*ALIGNMENTS)] = "variance"
    boosting: Annotated[str, one_of(*BOOSTING)] = "supervised"
    scaling: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seed: Seed = 0
    views: Count = 1
    starts: Count = 1


class EvaluateConfig(Section):
    """Which merges are measured on the test images."""

    modes: Modes | None = None
    batchnorm: Annotated[str, one_of(*POLICIES)] = "blend"


class TrainConfig(Section):
    """The whole file, paths made absolute."""

    model: ModelName
    experts: Annotated[dict[ReportName, File], AfterValidator(not_empty)]
    tasks: Annotated[dict[ReportName, TaskConfig], AfterValidator(not_empty)]
    output: Output
    pretrained: str | None = None
    fit: FitConfig = FitConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    device: Device = "auto"
    workers: Workers = WORKERS
    batch_size: Count = 64

    @field_validator("pretrained")
    @classmethod
    def _file_or_tag(cls, value: str | None, info: ValidationInfo) -> str | None:
        """A file becomes an absolute path; what is called like none is looked up as a tag later."""
        if value is None:
            return None
        path = located(Path(value), info)
        named_so = "/" in value or path.suffix in _FILES_OF_WEIGHTS
        return str(as_file(path)) if named_so or path.is_file() else value


def load_config(path: str | Path) -> TrainConfig:
    """Read and check a configuration file; raises as :func:`~.config_files.load`."""
    return load(path, TrainConfig)
