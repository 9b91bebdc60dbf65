"""Parameters of a merge that differ by tensor and by depth, as mergekit's YAML writes them.

A setting is a number (or flag, or word); a *gradient*, a list of numbers over the depth of the
model; a mapping ``{filter, value}``, or a list of them, whose values are numbers or gradients:

    weight: 0.5
    weight: [0, 0.5, 1]
    weight:
      - filter: self_attn
        value: [0, 0.5, 1]
      - value: 0.3

A filter is a part of a tensor's name, ``*`` or nothing is every tensor, and the first that applies
decides; where none does, the next outer scope is asked. The depth of layer i of a slice of L
layers is i / (L - 1), and 1 where the slice has one layer; tensors of no layer (embeddings, the
final norm, the head) have depth 0. Gradients are linear between their points.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

Scalar: TypeAlias = "float | bool | str"
Scope: TypeAlias = Mapping[str, Any]  # parameter -> setting


def depth(layer: int | None, layers: int) -> float:
    """Where a tensor of ``layer`` of a slice of ``layers`` layers lies, 0 to 1."""
    if layer is None:
        return 0.0
    return 1.0 if layers == 1 else layer / (layers - 1)


def look_up(
    name: str, tensor: str, at: float, scopes: Iterable[Scope], default: Scalar | None = None
) -> Scalar | None:
    """The value of parameter ``name`` for a tensor.

    Args:
        tensor: its name.
        at: its :func:`depth`.
        scopes: inner ones first.
        default: where no scope has a value for this tensor.
    """
    for scope in scopes:
        value = evaluate(scope.get(name), tensor, at)
        if value is not None:
            return value
    return default


def evaluate(setting: Any, tensor: str, at: float) -> Scalar | None:
    """The value of one setting, which has no :func:`faults`; None where no filter applies."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if not isinstance(setting[0], Mapping):
        return interpolate(setting, at)
    for entry in setting:
        only = entry.get("filter")
        if only is None or only == "*" or only in tensor:
            value = entry["value"]
            return interpolate(value, at) if isinstance(value, list) else value
    return None


def values(setting: Any) -> Iterator[Scalar]:
    """Every value of a setting that has no :func:`faults`."""
    if isinstance(setting, Mapping):
        yield from values(setting["value"])
    elif isinstance(setting, list):
        for entry in setting:
            yield from values(entry)
    elif setting is not None:
        yield setting


def filters(setting: Any) -> Iterator[str]:
    """Parts of names that a setting without :func:`faults` asks for."""
    entries = [setting] if isinstance(setting, Mapping) else setting
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, Mapping) and entry.get("filter") not in (None, "*"):
            yield entry["filter"]


def interpolate(points: Sequence[float], at: float) -> float:
    """Linear between equally spaced ``points`` over 0 to 1."""
    place = at * (len(points) - 1)
    below = min(int(place), len(points) - 1)
    above = min(below + 1, len(points) - 1)
    part = place - below
    return points[below] * (1 - part) + points[above] * part


def faults(setting: Any) -> Iterator[str]:
    """What is wrong with a setting; nothing if it can be evaluated."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        yield from _scalar_faults(setting)
    elif not setting:
        yield "must be a number, a list of numbers or of {filter, value}, got an empty list"
    elif any(isinstance(entry, Mapping) for entry in setting):
        for entry in setting:
            yield from _entry_faults(entry)
    else:
        for point in setting:
            yield from _point_faults(point)


def _entry_faults(entry: Any) -> Iterator[str]:
    if not isinstance(entry, Mapping) or not {"value"} <= set(entry) <= {"filter", "value"}:
        yield f"must have a value and at most a filter besides, got {entry!r}"
        return
    only, value = entry.get("filter"), entry["value"]
    if only is not None and (not isinstance(only, str) or not only):
        yield f"filter must be a part of a tensor's name, got {only!r}"
    if isinstance(value, list) and value:
        for point in value:
            yield from _point_faults(point)
    else:
        yield from _scalar_faults(value)


def _point_faults(point: Any) -> Iterator[str]:
    if isinstance(point, bool) or not isinstance(point, int | float) or not _is_finite(point):
        yield f"a list over the depth must be of finite numbers, got {point!r}"


def _scalar_faults(value: Any) -> Iterator[str]:
    number = isinstance(value, int | float)
    if not (_is_finite(value) if number else isinstance(value, str)):
        yield f"must be a finite number, a flag or a word, got {value!r}"


def _is_finite(number: float) -> bool:
    """Also as a float: an int may be beyond all of them."""
    return abs(number) <= sys.float_info.max
