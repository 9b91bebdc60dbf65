"""From a recipe and the headers of its models to what will be done, tensor by tensor.

No weight is read. Everything that is wrong (names, shapes, dtypes, parameters, layers) is found
here and listed at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .._checks import one_line_each, raise_all
from ..methods import Method
from . import names, parameters, sizes
from .layout import Beside, Layout, lay_out
from .modules import ANY, Models, Own, split
from .pieces import scope_of
from .planned import Planned
from .planner import Planner
from .recipe import ModelRef, Recipe
from .whole import Whole, as_one

_FILES = 16  # of weights: many more, each below a MiB, are a slip of the pen


class Layers(NamedTuple):
    """Their number, for ``config.json``.

    Attributes:
        keys: where it may be; a dot leads into a section.
        anew: whether it is told to a file that has none of the keys, whose model would take a
            number by default.
    """

    keys: tuple[str, ...]
    number: int
    anew: bool


class Plan(NamedTuple):
    """All tensors in the order in which they are read: that of the donor's files.

    Attributes:
        donor: the model whose configuration and tokenizer the result has.
        layers: of modules, or of a model with one stack of them.
        warnings: what is worth knowing, in words.
        whole: all tensors as one, where the method's scope is the model.
    """

    method: Method
    tensors: tuple[Planned, ...]
    layout: Layout
    donor: ModelRef
    layers: tuple[Layers, ...]
    warnings: tuple[str, ...]
    whole: Whole | None = None

    @property
    def bytes_in(self) -> int:
        """Of all inputs, each read once."""
        return sum(tensor.bytes for tensor in self.tensors)


def make_plan(
    recipe: Recipe,
    method: Method,
    models: Models,
    shard_bytes: int,
    seed: int = 0,
) -> Plan:
    """Check everything that headers tell, and say what will be done.

    Args:
        models: every model that ``recipe.models()`` names.
        shard_bytes: the largest size of a shard, headers apart.

    Raises:
        ValueError: everything that is wrong.
    """
    owns, left_out = split(recipe, models)
    planners = [Planner(own, method, seed) for own in owns]
    each = [list(planner.tensors()) for planner in planners]
    raise_all("merge", one_line_each(dict.fromkeys(f for p in planners for f in p.faults)))
    tensors, whole = [tensor for own in each for tensor in own], None
    if scope_of(recipe, method) == "model":
        tensors, whole = as_one(method, tensors)
    layout = lay_out([t.output for t in tensors], shard_bytes, _aside(method, planners, tensors))
    layers = (found for own, made in zip(owns, each, strict=True) for found in _layers(own, made))
    warned = [*(w for p in planners for w in p.warnings), *left_out]
    warned += [*_idle(recipe, tensors), *_small(layout, shard_bytes)]
    donor, told = planners[0].donor, tuple(dict.fromkeys(warned))
    return Plan(method, tuple(tensors), layout, donor, tuple(layers), told, whole)


def _idle(recipe: Recipe, tensors: Sequence[Planned]) -> Iterator[str]:
    """Filters that no tensor's name has: slips of the pen, mostly."""
    for scope, _ in recipe.scopes():
        for key, setting in scope.items():
            for part in parameters.filters(setting):
                if not any(part in tensor.output.name for tensor in tensors):
                    yield f"{key}: the filter {part!r} is part of no tensor's name"


def _small(layout: Layout, shard_bytes: int) -> Iterator[str]:
    if shard_bytes < 1 << 20 and len(layout.shards) > _FILES:
        text = sizes.text(shard_bytes)
        yield f"shard_size is {text}: the result has {len(layout.shards)} files of weights"


def _layers(own: Own, tensors: Sequence[Planned]) -> Iterator[Layers]:
    counts = names.layer_counts(tensor.output.name for tensor in tensors)
    if len(counts) == 1 and own.module.layers:
        yield Layers(own.module.layers, next(iter(counts.values())), own.module is not ANY)


def _aside(
    method: Method, planners: Sequence[Planner], tensors: Sequence[Planned]
) -> Beside | None:
    """The file of what the method writes besides.

    Raises:
        ValueError: it would be of other models in one slice than in another.
    """
    if method.aside is None:
        return None
    file, pieces = method.aside.file, [piece for p in planners for piece in p.pieces]
    every = list(dict.fromkeys(tuple(str(s.model) for s in p.experts) for p in pieces))
    if len(every) > 1:
        got = " and ".join(f"({', '.join(experts)})" for experts in every)
        raise ValueError(f"merge: {file} needs the same models in all slices, got {got}")
    metadata = {"format": method.aside.format, "experts": json.dumps(every[0])}
    return Beside(file, metadata, [output for t in tensors for output in t.beside])
