"""A merge of which all is known but the weights: recipe, models and plans are read and checked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .. import yaml_files
from .._checks import raise_all
from ..methods import METHODS, Method
from . import parameters, recipe_file, sizes, variants
from .checkpoint import Checkpoint
from .hub import absent, find_models
from .manifest import checksum
from .pieces import models_beside
from .plan import Plan, make_plan
from .portland import with_coefficients
from .recipe import ModelRef, Recipe
from .vocabularies import Vocabulary, unified


class Prepared(NamedTuple):
    """A result of which everything is known but the weights.

    Attributes:
        name: of its folder below that of the merge; empty where it is the only result.
        source: the recipe's file, or the one that asks for this result alone.
    """

    name: str
    recipe: Recipe
    source: bytes
    models: Mapping[ModelRef, Checkpoint]
    plan: Plan
    seed: int
    vocabulary: Vocabulary | None

    def record(self) -> dict[str, Any]:
        """What the result is made from, for its manifest: the same on every machine."""
        models = {
            str(model): {file.name: file.stat().st_size for file in checkpoint.files}
            for model, checkpoint in self.models.items()
        }
        xxh3, method = checksum(self.source), self.recipe.method
        made = {"method": method, "models": models, "seed": self.seed, "xxh3": xxh3}
        return {**made, **self.recipe.beside}

    def layout(self) -> str:
        """A checksum of names, types, shapes and places of the result's tensors."""
        return checksum(b"".join(shard.header for shard in self.plan.layout.shards))

    def identity(self) -> dict[str, Any]:
        """What tells merges apart here: the layout, and that no input has changed meanwhile."""
        changed = [file.stat().st_mtime_ns for c in self.models.values() for file in c.files]
        return {**self.record(), "layout": self.layout(), "times of the models' files": changed}


def prepare(
    config: str | Path | Mapping[str, Any], *, shard_size: int | str = "5G", seed: int = 0
) -> tuple[Prepared, ...]:
    """All checks of a merge that need no weights: its results, of the same inputs.

    Raises:
        ValueError: everything that is wrong.
        OSError: no such recipe.
    """
    if type(seed) is not int or not -(2**63) <= seed < 2**63:
        raise ValueError(f"merge: seed must be a signed 64-bit integer, got {seed!r}")
    content, source, base = _read(config)
    recipe, faults = recipe_file.read(content, METHODS)
    with _warned(recipe.warnings):
        if faults:
            faults += absent(recipe.models(), base)
            raise_all("recipe" if isinstance(config, Mapping) else str(config), faults)
        return _prepared(recipe, content, source, base, shard_size, seed)


@contextlib.contextmanager
def _warned(warnings: Sequence[str]) -> Iterator[None]:
    """Errors say too what was read over: a key that is not known may be what is missing."""
    try:
        yield
    except ValueError as error:
        told = (f"\nwarning: {text}" for text in warnings)
        raise ValueError("".join((str(error), *told))) from error


def _prepared(
    recipe: Recipe, content: Any, source: bytes, base: Path, shard_size: int | str, seed: int
) -> tuple[Prepared, ...]:
    recipe = with_coefficients(recipe, base)
    method = METHODS[recipe.method]
    opened, faults = find_models([*recipe.models(), *models_beside(recipe, method)], base)
    if faults:
        raise_all("merge", dict.fromkeys([*faults, *_setting_faults(recipe, method)]))
    merged, vocabulary = unified(recipe, {model: opened[model] for model in recipe.models()})
    if method.beside and any(merged[model] is not opened[model] for model in merged):
        raise ValueError(
            f"tokenizer: {method.name} cannot bring models beside the recipe's into another order "
            "of tokens: merge models of one vocabulary"
        )
    models = {**opened, **merged}
    recipes, sources = {"": recipe}, {"": source}
    if recipe.variants:
        own = {n: variants.resolved(content, v, method) for n, v in recipe.variants.items()}
        parsed = {name: recipe_file.parse(each, METHODS) for name, each in own.items()}
        recipes = {name: with_coefficients(each, base) for name, each in parsed.items()}
        sources = {name: variants.text(each) for name, each in own.items()}
    shard_bytes = sizes.parse("shard_size", shard_size)
    plans = _plans(recipes, lambda each: make_plan(each, method, models, shard_bytes, seed))
    return tuple(
        Prepared(n, recipes[n], sources[n], models, plans[n], seed, vocabulary) for n in recipes
    )


def _setting_faults(recipe: Recipe, method: Method) -> Iterator[str]:
    """What of a recipe's settings the method does not take, whichever tensors they are for."""
    for scope, model in recipe.scopes():
        whom = f" for {model}" if model is not None else ""
        for name in (key for key in scope if key in method.parameters):
            for value in parameters.values(scope[name]):
                yield from (f"{name}{whom} {f}" for f in method.parameters[name].faults(value))


def _plans(recipes: Mapping[str, Recipe], plan: Callable[[Recipe], Plan]) -> dict[str, Plan]:
    """All plans; faults that results have in common are told once."""
    plans: dict[str, Plan] = {}
    faults: dict[str, list[str]] = {}
    for name, recipe in recipes.items():
        try:
            plans[name] = plan(recipe)
        except ValueError as error:
            faults.setdefault(str(error), []).append(name)
    if len(faults) == 1 and not plans:
        raise ValueError(next(iter(faults)))
    told = {text.removeprefix("merge: ").replace("\n", "\n    "): n for text, n in faults.items()}
    raise_all("merge", [f"{', '.join(names)}: {text}" for text, names in told.items()])
    return plans


def _read(config: str | Path | Mapping[str, Any]) -> tuple[Any, bytes, Path]:
    if isinstance(config, Mapping):
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        return config, text.encode(), Path()
    path = Path(config)
    return yaml_files.read(path), path.read_bytes(), path.resolve().parent
