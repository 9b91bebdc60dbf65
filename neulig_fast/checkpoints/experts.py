"""``nf.emr_expert``: an expert's model from an EMR merge, its masks and the pristine base."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import yaml_files
from .._checks import did_you_mean, raise_all
from ..methods.masks import MEANS, Masks
from . import dtypes
from .checkpoint import open_checkpoint
from .companions import RECIPE
from .headers import Entry, read_header
from .hub import folder_of
from .read import Reader
from .recipe import ModelRef

_BLOCK = 1 << 20  # elements; bits are unpacked so many at once


def emr_expert(
    folder: str | Path, expert: str | int, base: str | Path | None = None
) -> dict[str, Tensor]:
    """The model that an EMR merge keeps of one of its experts.

    theta_0 + lambda_i M_i (theta - theta_0), with the merged theta and what is written beside it
    (:mod:`neulig_fast.methods.masks` has the formulas). Always made from the base as it is, so that
    no error is carried from one expert to the next; sums in fp32 (fp64 for fp64), rounded once.
    theta - theta_0 is what a merge in fp32, or in the experts' own type, has not rounded away.

    Args:
        folder: of the merge.
        expert: a model of the recipe by its path, by the end of it, or by its number from 0.
        base: folder of the base model; by default the recipe's, beside the merge or in the working
            directory.

    Returns:
        Name -> tensor, in the merge's types; what was not merged is the base's.

    Raises:
        FileNotFoundError: no such folders, or no masks in them.
        ValueError: masks of another format, an unknown expert, a base of other names or shapes,
            a recipe of slices, or one whose ``lambda`` was 0.
    """
    folder = Path(folder)
    path = folder / Masks.file
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {folder} is no merge of EMR's")
    header = read_header(path)
    if header.metadata.get("format") != Masks.format:
        raise ValueError(f"{path}: is not of the format {Masks.format}")
    experts = _names(path, header.metadata.get("experts"))
    number = _number(path, expert, experts)
    kept = {entry.name: entry for entry in header.entries}
    merged = open_checkpoint(folder).entries
    origin = open_checkpoint(_base(folder, base)).entries
    raise_all("emr_expert", [*_faults(merged, origin), *_mask_faults(merged, kept, len(experts))])
    with Reader() as reader:
        scale, lam = _scale(reader, kept, number)
        return {
            name: _expert(reader, entry, origin[name], kept.get(f"{number}/{name}"), scale / lam)
            for name, entry in merged.items()
        }


def _names(path: Path, text: str | None) -> list[str]:
    """The recipe's models, as the masks' metadata have them."""
    try:
        names = json.loads(text or "")
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: does not say which experts it is of")
    return names


def _number(path: Path, expert: str | int, experts: Sequence[str]) -> int:
    if isinstance(expert, int) and 0 <= expert < len(experts):
        return expert
    found = [i for i, name in enumerate(experts) if name == expert] or [
        i for i, name in enumerate(experts) if name.rstrip("/").endswith(f"/{expert}")
    ]
    if len(found) == 1:
        return found[0]
    ends = [name.rstrip("/").rpartition("/")[2] for name in experts]
    hint = did_you_mean(str(expert), ends) or f" (known: {', '.join(experts)})"
    what = "there are several" if found else "there is no expert"
    raise ValueError(f"{path}: {what} {expert!r}{hint}")


def _base(folder: Path, base: str | Path | None) -> Path:
    recipe: Mapping[str, Any] = yaml_files.read(folder / RECIPE)
    if recipe.get("models") is None:
        raise ValueError(f"{folder}: experts of a recipe of slices cannot be made again")
    if base is not None:
        return Path(base)
    return folder_of(ModelRef.parse(recipe["base_model"]), folder.parent)


def _faults(merged: Mapping[str, Entry], base: Mapping[str, Entry]) -> Iterator[str]:
    for name, entry in merged.items():
        if name not in base:
            yield f"the base has no {name!r}{did_you_mean(name, base)}"
        elif base[name].shape != entry.shape:
            got, wanted = list(base[name].shape), list(entry.shape)
            yield f"the base has {name!r} of shape {got}, the merge {wanted}"


def _mask_faults(
    merged: Mapping[str, Entry], kept: Mapping[str, Entry], experts: int
) -> Iterator[str]:
    for name, entry in kept.items():
        owner, _, tensor = name.partition("/")
        if tensor not in merged:
            yield f"the masks have {name!r}, the merge no {tensor!r}"
            continue
        packed = (-(-merged[tensor].elements // 8),)
        wanted = ("F64", (experts, 3)) if owner == MEANS else ("U8", packed)
        if (entry.dtype, entry.shape) != wanted:
            yield f"the masks have {name!r} of {entry.dtype} {list(entry.shape)}, wanted {wanted}"


def _scale(reader: Reader, kept: Mapping[str, Entry], number: int) -> tuple[float, float]:
    """lambda_i, and what the recipe multiplied with."""
    rows = [
        _read(reader, entry, torch.float64).view(-1, 3)[number]
        for name, entry in kept.items()
        if name.startswith(f"{MEANS}/")
    ]
    if not rows:
        return 1.0, 1.0  # nothing was merged
    own, unified, lam = torch.stack(rows).unbind(1)
    if len(set(lam.tolist())) != 1 or lam[0] == 0:
        raise ValueError(
            "emr_expert: lambda must have been the same for all tensors and not 0, got "
            f"{', '.join(f'{value:g}' for value in sorted(set(lam.tolist())))}"
        )
    total = float(unified.sum())
    return (float(own.sum()) / total if total != 0 else 1.0), float(lam[0])


def _expert(reader: Reader, merged: Entry, base: Entry, mask: Entry | None, scale: float) -> Tensor:
    if mask is None:
        return _read(reader, merged, dtypes.as_torch(merged.dtype)).view(merged.shape)
    wide = dtypes.as_torch(dtypes.common([merged.held, base.held, "F32"]))
    origin, change = _read(reader, base, wide), _read(reader, merged, wide)
    change -= origin
    bits = _read(reader, mask, torch.uint8)
    for at in range(0, len(origin), _BLOCK):
        part = slice(at, at + _BLOCK)
        own = _unpacked(bits[at // 8 : (at + _BLOCK) // 8])[: len(origin[part])]
        origin[part] += torch.where(own, scale * change[part], 0)
    return origin.to(dtypes.as_torch(merged.dtype)).view(merged.shape)


def _unpacked(bits: Tensor) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8)
    return (bits[:, None] >> places & 1).bool().flatten()


def _read(reader: Reader, entry: Entry, dtype: torch.dtype) -> Tensor:
    into = torch.empty(entry.elements, dtype=dtype)
    scratch = torch.empty(8 * entry.elements + entry.fixed_scratch(8), dtype=torch.uint8)
    reader.read(entry, 0, into, scratch)
    return into
