"""CONFIG.yaml of ``neulig-fast align``: what it may hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from .alignment.aligner import MATCHES
from .alignment.similarity import KINDS, Kind
from .alignment.sweeps import ORDERS, Order
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
    load,
    one_of,
)

ALIGNMENT, MERGED, REPORT = "alignment.safetensors", "merged.safetensors", "alignment.json"
REPAIRS = ("none", "batchnorm", "rescale")


def aligned_file(expert: str) -> str:
    """What the aligned expert's file is called in the output folder."""
    return f"aligned_{expert}.safetensors"


def _several(experts: dict[str, Path]) -> dict[str, Path]:
    if len(experts) < 2:
        raise ValueError(f"needs two or more, got {len(experts)}")
    return experts


Share = Annotated[float, Field(ge=0, le=1)]


class AlignConfig(Section):
    """The whole file, paths made absolute. A field may be checked against those above it."""

    model: ModelName
    experts: Annotated[dict[Name, File], AfterValidator(_several)]
    output: Output
    balance: Share = 0.5
    balances: Annotated[list[Share], Field(min_length=1)] | None = None
    match: Annotated[str, one_of(*MATCHES)] = "align"
    similarity: Annotated[Kind, one_of(*KINDS)] = "correlation"
    order: Annotated[Order, one_of(*ORDERS)] = "colour"
    seed: Seed = 0
    sweeps: Count = 100
    repair: Annotated[str, one_of(*REPAIRS)] = "none"
    images: Annotated[Folder | None, Field(validate_default=True)] = None
    max_images: Count | None = None
    device: Device = "auto"
    workers: Workers = WORKERS
    batch_size: Count = 64

    @field_validator("output")
    @classmethod
    def _spares_its_inputs(cls, value: Path, info: ValidationInfo) -> Path:
        experts: dict[str, Path] = info.data.get("experts", {})
        files = (MERGED, ALIGNMENT, REPORT, *map(aligned_file, experts))
        inputs = {f"experts.{name}": path for name, path in experts.items()}
        inputs["model"] = Path(info.data.get("model", ""))
        # A file of the folder may be a link, which writing follows.
        written = {(value / name).resolve() for name in files}
        lost = [name for name, path in inputs.items() if path in written]
        if lost:
            raise ValueError(f"{value} holds the files of {', '.join(lost)} under names to write")
        return value

    @property
    def grid(self) -> list[float]:
        """The balances to try."""
        return _grid(self.model_dump())

    @field_validator("balances")
    @classmethod
    def _not_both(cls, value: list[float] | None, info: ValidationInfo) -> list[float] | None:
        if value is not None and info.data.get("balance", 0.5) != 0.5:
            raise ValueError("is a grid to choose from: leave balance out, or leave this out")
        return value

    @field_validator("similarity")
    @classmethod
    def _alone(cls, value: str, info: ValidationInfo) -> str:
        if value == "inner_product" and min(_grid(info.data)) != 1:
            raise ValueError(f"{value} cannot be mixed with activations: it needs balance: 1")
        return value

    @field_validator("repair")
    @classmethod
    def _possible(cls, value: str, info: ValidationInfo) -> str:
        if value == "rescale" and info.data.get("match") == "zip":
            raise ValueError("rescale repairs merges of aligned experts, which match: zip has not")
        return value

    @field_validator("images")
    @classmethod
    def _given_where_used(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        balance, repair = min(_grid(info.data)), info.data.get("repair", "none")
        if value is None and info.data.get("balances") is not None:
            raise ValueError("is missing: balances are compared by what the merge does on images")
        if value is None and balance < 1:
            raise ValueError(f"is missing: balance {balance:g} compares activations (1 does not)")
        if value is None and repair != "none":
            raise ValueError(f"is missing: repair: {repair} runs the merge on images")
        return value


def _grid(fields: Mapping[str, Any]) -> list[float]:
    """All balances; 1, which any setting goes with, where the field has a fault."""
    return fields.get("balances") or [fields.get("balance", 1)]


def load_config(path: str | Path) -> AlignConfig:
    """Read and check a configuration file; raises as :func:`~.config_files.load`."""
    return load(path, AlignConfig)
