"""One alignment as one safetensors file: matchings as tensors, everything else as JSON metadata."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .._checks import raise_all, shape
from ..state_files import write_safetensors
from .spec import Node, Spec, Use, check_match
from .zip import Zip

if TYPE_CHECKING:
    from .result import Alignment

_FORMAT = "neulig_fast.alignment.1"
_PLAIN = ("match", "balance", "value", "values", "converged", "interrupted", "names")


def save(alignment: Alignment, path: str | Path) -> None:
    """See :meth:`Alignment.save`."""
    tensors: dict[str, Tensor] = {"distances_before": alignment.distances_before}
    if alignment.distances_after is not None:
        tensors["distances_after"] = alignment.distances_after
    for name, matching in alignment.matchings.items():
        if isinstance(matching, Zip):
            tensors[f"merged/{name}"] = matching.merged
            tensors[f"accepted/{name}"] = matching.accepted
        else:
            tensors[f"order/{name}"] = matching
    content = {name: getattr(alignment, name) for name in _PLAIN}
    content["nodes"] = [dataclasses.asdict(node) for node in alignment.spec.nodes.values()]
    content["uses"] = [dataclasses.asdict(use) for use in alignment.spec.uses]
    write_safetensors(path, tensors, {"format": _FORMAT, "alignment": json.dumps(content)})


def load(path: str | Path) -> dict[str, Any]:
    """The fields of :class:`Alignment` that :func:`save` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file of an alignment, or a damaged one.
    """
    metadata, tensors = _read(Path(path))
    if metadata.get("format") != _FORMAT:
        got = metadata.get("format", "none")
        raise ValueError(f"{path}: must be a file of format {_FORMAT}, got {got}")
    try:
        content = json.loads(metadata["alignment"])
        spec = Spec([Node(**n) for n in content["nodes"]], [Use(**u) for u in content["uses"]])
        fields = {name: content[name] for name in _PLAIN}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged description of an alignment ({error})") from error
    raise_all(str(path), _plain_faults(**fields))
    names, match = tuple(fields["names"]), fields["match"]
    raise_all(str(path), _distance_faults(tensors, match, len(names)))
    kind = _orders if match == "align" else _zips
    return {
        **fields,
        "names": names,
        "spec": spec,
        "matchings": kind(str(path), spec, tensors, names),
        "distances_before": tensors["distances_before"],
        "distances_after": tensors.get("distances_after"),
    }


def _read(path: Path) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error


# -- what a file may hold -------------------------------------------------------------------------


def _plain_faults(
    match: Any, balance: Any, value: Any, values: Any, converged: Any, interrupted: Any, names: Any
) -> Iterator[str]:
    if match not in ("align", "zip"):
        yield f"match must be one of align, zip, got {match!r}"
    for name, number in (("balance", balance), ("value", value)):
        if not _is_number(number):
            yield f"{name} must be a number, got {number!r}"
    if not isinstance(values, list) or not all(
        isinstance(one, dict) and all(map(_is_number, one.values())) for one in values
    ):
        yield "values must be a list of numbers by node"
    for name, flag in (("converged", converged), ("interrupted", interrupted)):
        if not isinstance(flag, bool):
            yield f"{name} must be true or false, got {flag!r}"
    texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not texts or not names or len(set(names)) != len(names):
        yield f"names must be a list of different names, got {names!r}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _distance_faults(tensors: Mapping[str, Tensor], match: str, num_networks: int) -> Iterator[str]:
    names = ["distances_before"] + ["distances_after"] * (match == "align")
    for name in names:
        yield from _tensor_faults(name, name, tensors, (num_networks, num_networks), torch.float64)


def _tensor_faults(
    key: str,
    what: str,
    tensors: Mapping[str, Tensor],
    wanted: tuple[int, ...],
    dtype: torch.dtype,
) -> Iterator[str]:
    if key not in tensors:
        yield f"{what} is missing"
    elif tuple(tensors[key].shape) != wanted or tensors[key].dtype != dtype:
        got = f"{shape(tensors[key])} {tensors[key].dtype}"
        yield f"{what} must be {shape(wanted)} {dtype}, got {got}"


def _orders(
    path: str, spec: Spec, tensors: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, Tensor]:
    found: list[str] = []
    for name, node in spec.nodes.items():
        key, what = f"order/{name}", f"order of node {name}"
        found += _tensor_faults(key, what, tensors, (len(names), node.size), torch.int64)
    raise_all(path, found)
    orders = {name: tensors[f"order/{name}"] for name in spec.nodes}
    for i, network in enumerate(names):
        check_match(spec, {name: order[i] for name, order in orders.items()}, f"{path}: {network}")
    moved = [name for name, order in orders.items() if not _is_identity(order[0])]
    raise_all(path, (f"node {name}: the first expert's order must be 0, 1, ..." for name in moved))
    return orders


def _is_identity(order: Tensor) -> bool:
    return torch.equal(order, torch.arange(len(order), device="cpu"))


def _zips(
    path: str, spec: Spec, tensors: Mapping[str, Tensor], names: Sequence[str]
) -> dict[str, Zip]:
    found: list[str] = []
    for name, node in spec.nodes.items():
        units = (len(names), node.size)
        key, what = f"merged/{name}", f"merged of node {name}"
        faults = list(_tensor_faults(key, what, tensors, units, torch.int64))
        if not faults and set(tensors[key].flatten().tolist()) != set(range(node.size)):
            faults.append(f"{what} must be 0 .. {node.size - 1}, with units in all of them")
        key, what = f"accepted/{name}", f"accepted of node {name}"
        joins = (tensors[key].numel() if key in tensors else 0,)
        found += [*faults, *_tensor_faults(key, what, tensors, joins, torch.float64)]
    raise_all(path, found)
    return {
        name: Zip(tensors[f"merged/{name}"], node.size, tensors[f"accepted/{name}"])
        for name, node in spec.nodes.items()
    }
