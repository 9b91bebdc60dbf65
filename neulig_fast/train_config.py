"""CONFIG.yaml of ``neulig-fast train``: what it may hold, and everything that is wrong with one.

Read by YAML's safe loader into pydantic models that know every key. Nothing in it is evaluated.
All faults are found before any work and listed in one error, each under its place in the file
(``fit.epochs``), with the nearest known key where one is unknown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from ._checks import did_you_mean, raise_all
from .neulig.batchnorm import POLICIES
from .neulig.modes import MODES
from .neulig.penalty import ALIGNMENTS
from .ops.neulig_loss import BOOSTING

TEMPLATES = ("a photo of a {}.",)
# Names end up in file names, in figures and as keys of the report.
_NAME = re.compile(r"[A-Za-z0-9_][\w.+-]*")
_RESERVED = ("mean",)


def _located(path: Path, info: ValidationInfo) -> Path:
    """Relative paths are relative to the YAML file."""
    base = (info.context or {}).get("base", Path())
    return (base / path.expanduser()).resolve()


def _file(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{path} {'is a folder, not a file' if path.is_dir() else 'is no file'}")
    return path


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"{path} {'is a file, not a folder' if path.exists() else 'is no folder'}")
    return path


def _output(path: Path) -> Path:
    nearest = next(p for p in (path, *path.parents) if p.exists())
    if not nearest.is_dir():
        raise ValueError(f"{nearest} is a file, not a folder")
    return path


def _one_of(*known: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in known:
            hint = did_you_mean(value, known)
            raise ValueError(f"must be one of {', '.join(known)}, got {value!r}{hint}")
        return value

    return AfterValidator(check)


def _name(value: Any) -> str:
    """YAML reads 7 as a number and ``no`` as false; both are likely names of classes or tasks."""
    if isinstance(value, bool):
        raise ValueError("YAML reads yes, no, on and off as true or false: put the name in quotes")
    return str(value) if isinstance(value, (int, float)) else value


def _usable(value: str) -> str:
    if not _NAME.fullmatch(value) or value in _RESERVED:
        if value in _RESERVED:
            raise ValueError(f"the name {value!r} is taken by the report")
        raise ValueError(f"names are of letters, digits, _ . + and -, got {value!r}")
    return value


def _template(value: str) -> str:
    if "{}" not in value:
        raise ValueError(f"a template holds {{}} where the class name goes, got {value!r}")
    return value


def _names_by_folder(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_name(key): _name(name) for key, name in value.items()}
    return [_name(name) for name in value] if isinstance(value, list) else value


def _device(value: str) -> str:
    if value == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", value):
        raise ValueError(f"must be auto, cpu, cuda, cuda:1, mps or xpu, got {value!r}")
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"no {value} here: {str(error).splitlines()[0]}") from error
    return value


def _not_empty(value: Any) -> Any:
    if not value:
        raise ValueError("must not be empty")
    return value


File = Annotated[Path, AfterValidator(_located), AfterValidator(_file)]
Folder = Annotated[Path, AfterValidator(_located), AfterValidator(_folder)]
Output = Annotated[Path, AfterValidator(_located), AfterValidator(_output)]
Name = Annotated[str, BeforeValidator(_name), AfterValidator(_usable)]
Template = Annotated[str, AfterValidator(_template)]
Modes = Annotated[tuple[Annotated[str, _one_of(*MODES)], ...], AfterValidator(_not_empty)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_flags(cls, value: Any) -> Any:
        """There are no switches here; pydantic would read ``epochs: yes`` as 1."""
        if isinstance(value, bool):
            raise ValueError(f"takes no true or false, got {str(value).lower()}")
        return value


class TaskConfig(_Section):
    """One data set: folders with a sub-folder of images per class."""

    train: Folder
    test: Folder
    val: Folder | None = None
    class_names: Annotated[dict[str, str] | list[str] | None, BeforeValidator(_names_by_folder)] = (
        None
    )
    templates: Annotated[tuple[Template, ...], AfterValidator(_not_empty)] = TEMPLATES
    expert: Name | None = None


class PreprocessConfig(_Section):
    """Where the experts' preprocessing is not what open_clip takes for the model by itself."""

    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: Annotated[str, _one_of("bicubic", "bilinear")] | None = None
    resize_mode: Annotated[str, _one_of("shortest", "longest", "squash")] | None = None


class FitConfig(_Section):
    """How the Portland is trained; the arguments of ``NeuLig`` and ``NeuLig.fit``."""

    epochs: Count = 100
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    batch_size: Count = 128
    patience: Count | None = None
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    alignment: Annotated[str, _one_of(*ALIGNMENTS)] = "variance"
    boosting: Annotated[str, _one_of(*BOOSTING)] = "supervised"
    scaling: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    views: Count = 1
    starts: Count = 1


class EvaluateConfig(_Section):
    """Which merges are measured on the test images."""

    modes: Modes | None = None
    batchnorm: Annotated[str, _one_of(*POLICIES)] = "blend"


class TrainConfig(_Section):
    """The whole file, paths made absolute."""

    model: str
    experts: Annotated[dict[Name, File], AfterValidator(_not_empty)]
    tasks: Annotated[dict[Name, TaskConfig], AfterValidator(_not_empty)]
    output: Output
    pretrained: str | None = None
    fit: FitConfig = FitConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    preprocess: PreprocessConfig = PreprocessConfig()
    device: Annotated[str, AfterValidator(_device), Field(validate_default=True)] = "auto"
    workers: Annotated[int, Field(ge=0)] = min(4, os.cpu_count() or 1)
    batch_size: Count = 64

    @field_validator("pretrained")
    @classmethod
    def _file_or_tag(cls, value: str | None, info: ValidationInfo) -> str | None:
        """A file becomes an absolute path; anything else is looked up as a tag later."""
        path = None if value is None else _located(Path(value), info)
        return str(path) if path is not None and path.is_file() else value

    @field_validator("model")
    @classmethod
    def _name_or_json(cls, value: str, info: ValidationInfo) -> str:
        return str(_file(_located(Path(value), info))) if value.endswith(".json") else value


def load_config(path: str | Path) -> TrainConfig:
    """Read and check a configuration file.

    Raises:
        OSError: no such file, or not readable.
        ValueError: broken YAML (with line and column), or everything that is wrong with its
            content, listed at once.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 (byte {error.start})") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: {_why_broken(error)}") from error
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise ValueError(f"{path}: {found}, expected keys such as model, experts and tasks")
    try:
        return TrainConfig.model_validate(content, context={"base": path.resolve().parent})
    except ValidationError as error:
        faults = [_fault(detail) for detail in error.errors(include_url=False)]
    raise_all(str(path), dict.fromkeys(faults))
    raise AssertionError("unreachable: a validation error has details")


class _Loader(yaml.SafeLoader):
    """The safe loader, and a key that appears twice is an error instead of overwriting."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} appears twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _why_broken(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    if "could not determine a constructor" in problem:
        problem += "; tags such as !!python are not allowed"
    return f"{where}{problem}"


def _fault(detail: Mapping[str, Any]) -> str:
    """One line for one fault: its place, what is wrong, what was found."""
    place = [str(part) for part in detail["loc"] if part not in ("dict[str,str]", "list[str]")]
    if place and place[-1] == "[key]":
        # A key that is no text appears in the place as a number.
        place = place[: -2 if isinstance(detail["input"], bool) else -1]
    where, kind, message = ".".join(place), detail["type"], detail["msg"]
    if kind == "extra_forbidden":
        known = _known_keys(place[:-1])
        hint = did_you_mean(place[-1], known) or f" (known: {', '.join(known)})"
        return f"{where}: unknown key{hint}"
    if kind == "missing":
        return f"{where}: is missing"
    if kind == "value_error":
        return f"{where}: {message.removeprefix('Value error, ')}"
    return f"{where}: {message[0].lower()}{message[1:]}, got {detail['input']!r}"


def _known_keys(place: list[str]) -> list[str]:
    """The keys that the section at ``place`` may have."""
    model: Any = TrainConfig
    for part in place:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[part].annotation
        else:
            model = get_args(model)[-1]  # dict[Name, Section]
    return list(model.model_fields)
