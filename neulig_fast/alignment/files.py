"""One alignment as one safetensors file: matchings as tensors, everything else as JSON metadata."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .._checks import raise_all
from ..state_files import write_safetensors
from .spec import Node, Spec, Use
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
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: damaged description of an alignment ({error})") from error
    fields["names"] = tuple(fields["names"])
    shape = (len(fields["names"]),)
    raise_all(str(path), _faults(spec, fields["match"], tensors, shape[0]))
    return {
        **fields,
        "spec": spec,
        "matchings": {name: _matching(node, tensors) for name, node in spec.nodes.items()},
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


def _faults(spec: Spec, match: str, tensors: Mapping[str, Tensor], num_networks: int) -> list[str]:
    kinds = ("order",) if match == "align" else ("merged", "accepted")
    found = [] if "distances_before" in tensors else ["distances_before is missing"]
    for name, node in spec.nodes.items():
        missing = [kind for kind in kinds if f"{kind}/{name}" not in tensors]
        found += [f"{kind} of node {name} is missing" for kind in missing]
        if not missing and tuple(tensors[f"{kinds[0]}/{name}"].shape) != (num_networks, node.size):
            found.append(f"{kinds[0]} of node {name} must be ({num_networks}, {node.size})")
    return found


def _matching(node: Node, tensors: Mapping[str, Tensor]) -> Any:
    if (order := tensors.get(f"order/{node.name}")) is not None:
        return order
    merged = tensors[f"merged/{node.name}"]
    return Zip(merged, node.size, tensors[f"accepted/{node.name}"])
