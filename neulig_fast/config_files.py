"""YAML files of the commands: the types of their values, and everything that is wrong with one.

Read into pydantic models that know every key. All faults are found before any work and listed in
one error, each under its place in the file (``fit.epochs``), with the nearest known key where one
is unknown.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from ._checks import device_fault, did_you_mean, raise_all, usable_device
from .yaml_files import read

# Names end up in file names, in figures and as keys of reports.
_NAME = re.compile(r"[A-Za-z0-9_][\w.+-]*")


def located(path: Path, info: ValidationInfo) -> Path:
    """Relative paths are relative to the YAML file."""
    base = (info.context or {}).get("base", Path())
    return (base / path.expanduser()).resolve()


def as_file(path: Path) -> Path:
    """A validator of files that must be there."""
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


def _name_or_json(value: str, info: ValidationInfo) -> str:
    return str(as_file(located(Path(value), info))) if value.endswith(".json") else value


def one_of(*known: str) -> BeforeValidator:
    """A validator of words: the value must be one of those ``known``."""

    def check(value: Any) -> Any:
        if value not in known:
            hint = did_you_mean(str(value), known)
            raise ValueError(f"must be one of {', '.join(known)}, got {value!r}{hint}")
        return value

    return BeforeValidator(check)


def as_name(value: Any) -> str:
    """YAML reads 7 as a number and ``no`` as false; both are likely names of classes or tasks."""
    if isinstance(value, bool):
        raise ValueError("YAML reads yes, no, on and off as true or false: put the name in quotes")
    return str(value) if isinstance(value, (int, float)) else value


def _usable(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(f"names are of letters, digits, _ . + and -, got {value!r}")
    return value


def _summing(device: str) -> str:
    fault = device_fault(device)
    if fault is not None:
        raise ValueError(fault)
    return device


def not_empty(value: Any) -> Any:
    """A validator of lists and mappings."""
    if not value:
        raise ValueError("must not be empty")
    return value


File = Annotated[Path, AfterValidator(located), AfterValidator(as_file)]
Folder = Annotated[Path, AfterValidator(located), AfterValidator(_folder)]
Output = Annotated[Path, AfterValidator(located), AfterValidator(_output)]
Name = Annotated[str, BeforeValidator(as_name), AfterValidator(_usable)]
ModelName = Annotated[str, AfterValidator(_name_or_json)]  # or the absolute path of a .json file
Device = Annotated[
    str, AfterValidator(usable_device), AfterValidator(_summing), Field(validate_default=True)
]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Workers = Annotated[int, Field(ge=0)]
WORKERS = min(4, os.cpu_count() or 1)


class Section(BaseModel):
    """A mapping of a configuration file, all of whose keys are known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    _source: str = PrivateAttr("configuration")

    @property
    def source(self) -> str:
        """The file's name, if this is all of one: for messages."""
        return self._source

    @field_validator("*", mode="before")
    @classmethod
    def _no_flags(cls, value: Any) -> Any:
        """There are no switches here; pydantic would read ``epochs: yes`` as 1."""
        if isinstance(value, bool):
            raise ValueError(f"takes no true or false, got {str(value).lower()}")
        return value


Config = TypeVar("Config", bound=Section)


def load(path: str | Path, kind: type[Config]) -> Config:
    """Read and check a configuration file.

    Args:
        kind: what the whole file is.

    Raises:
        OSError: no such file, or not readable.
        ValueError: broken YAML (with line and column), or everything that is wrong with its
            content, listed at once.
    """
    path = Path(path)
    content = read(path)
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}"
        first, second, third = list(kind.model_fields)[:3]
        raise ValueError(f"{path}: {found}, expected keys such as {first}, {second} and {third}")
    try:
        config = kind.model_validate(content, context={"base": path.resolve().parent})
    except ValidationError as error:
        faults = [_fault(detail, kind) for detail in error.errors(include_url=False)]
        raise_all(str(path), dict.fromkeys(faults))
        raise AssertionError("unreachable: a validation error has details") from error
    config._source = str(path)
    return config


def _fault(detail: Mapping[str, Any], kind: type[Section]) -> str:
    """One line for one fault: its place, what is wrong, what was found."""
    place = [str(part) for part in detail["loc"] if part not in ("dict[str,str]", "list[str]")]
    if place and place[-1] == "[key]":
        # A key that is no text appears in the place as a number.
        place = place[: -2 if isinstance(detail["input"], bool) else -1]
    where, fault, message = ".".join(place), detail["type"], detail["msg"]
    if fault == "extra_forbidden":
        known = _known_keys(kind, place[:-1])
        hint = did_you_mean(place[-1], known) or f" (known: {', '.join(known)})"
        return f"{where}: unknown key{hint}"
    if fault == "missing":
        return f"{where}: is missing"
    if fault == "value_error":
        return f"{where}: {message.removeprefix('Value error, ')}"
    return f"{where}: {message[0].lower()}{message[1:]}, got {detail['input']!r}"


def _known_keys(kind: Any, place: list[str]) -> list[str]:
    """The keys that the section at ``place`` may have."""
    for part in place:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = kind.model_fields[part].annotation
        else:
            kind = get_args(kind)[-1]  # dict[Name, Section]
    return list(kind.model_fields)
