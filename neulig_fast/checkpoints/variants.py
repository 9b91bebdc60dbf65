"""Several results of one reading: what a recipe asks for under ``outputs`` or ``sweep``.

    neulig_fast:
      outputs:                             # a folder each
        weak: {parameters: {lambda: 0.3}}
        code: {models: {m0: {weight: 0.7}, m1: {weight: 0.3}}}

    neulig_fast:
      sweep: {lambda: [0.3, 0.5], density: [0.2, 0.4]}     # all four combinations

A result's values win over those that the file has anywhere, a model's over ``parameters``; where
they have a filter, the file decides on the tensors that it leaves out. So each result has a recipe
of its own, :func:`resolved`, which asks for nothing else and alone gives the same files.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import yaml

from .._checks import did_you_mean
from . import parameters
from .headers import INDEX, SINGLE
from .manifest import MANIFEST
from .recipe import ModelRef, Parameters, Recipe, Variant

if TYPE_CHECKING:
    from ..methods import Method

KEYS = ("outputs", "sweep")  # of our section
_VARIANT = ("parameters", "models")
_NAME = re.compile(r"[A-Za-z0-9_][\w.+=,-]{0,199}")  # of folders
_MOST = 1000  # outputs of a sweep: more is a slip of the pen


def read(recipe: Recipe, method: Method) -> tuple[dict[str, Variant], list[str]]:
    """What our section asks for, by the names of folders, and everything that is wrong with it.

    Nothing is asked for, and nothing wrong, where it has neither ``outputs`` nor ``sweep``.
    """
    given = [key for key in KEYS if key in recipe.ours]
    if len(given) > 1:
        return {}, ["neulig_fast: must have one of outputs and sweep at most, got both"]
    reader = _Reader(method, _experts(recipe, method))
    if given == ["outputs"]:
        return reader.outputs(recipe.ours["outputs"]), reader.faults
    return (reader.sweep(recipe.ours["sweep"]) if given else {}), reader.faults


def resolved(content: Mapping[str, Any], variant: Variant, method: Method) -> dict[str, Any]:
    """The recipe of one result, as the content of a file: without outputs and sweep.

    Args:
        content: of a file in which nothing is wrong.
        variant: one of those that :func:`read` found in it.
    """
    ours = {key: v for key, v in content["neulig_fast"].items() if key not in KEYS}
    found = {key: value for key, value in content.items() if key != "neulig_fast"}
    each = {n: v for n, v in variant.parameters.items() if method.parameters[n].each}
    whole = {n: v for n, v in variant.parameters.items() if n not in each}

    def source(entry: Mapping[str, Any]) -> dict[str, Any]:
        model = ModelRef.parse(entry["model"])
        return _with(entry, _over(each, variant.models.get(model, {})))

    def own(section: Mapping[str, Any]) -> dict[str, Any]:
        """What a slice or a module says of its own would win over the outermost parameters."""
        named = section.get("parameters") or {}
        return _with(section, {n: v for n, v in whole.items() if n in named})

    def part(section: dict[str, Any]) -> dict[str, Any]:
        if section.get("models") is not None:
            section["models"] = [source(entry) for entry in section["models"]]
        if section.get("slices") is not None:
            section["slices"] = [
                own(piece) | {"sources": [source(entry) for entry in piece["sources"]]}
                for piece in section["slices"]
            ]
        return section

    if found.get("modules") is not None:
        found["modules"] = {name: part(own(m)) for name, m in found["modules"].items()}
    return _with(part(found), whole) | ({"neulig_fast": ours} if ours else {})


def text(content: Mapping[str, Any]) -> bytes:
    """A recipe as a file has it."""
    dumped = yaml.dump(dict(content), Dumper=_Plain, sort_keys=False, allow_unicode=True)
    return dumped.encode()


class _Plain(yaml.SafeDumper):
    """Writes values out wherever they stand, instead of anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _experts(recipe: Recipe, method: Method) -> list[ModelRef]:
    """Models that have parameters of their own."""
    found: dict[ModelRef, None] = {}
    for part in recipe.parts.values():
        for piece in part.slices:
            base = piece.base or part.base or recipe.base
            found |= {
                source.model: None
                for source in piece.sources
                if method.base == "one more" or source.model != base
            }
    return list(found)


def _with(section: Mapping[str, Any], own: Parameters) -> dict[str, Any]:
    """A part of a file with values that win over its parameters."""
    if not own:
        return dict(section)
    return {**section, "parameters": _over(section.get("parameters") or {}, own)}


def _over(old: Parameters, new: Parameters) -> dict[str, Any]:
    return {**old, **{name: _first(value, old.get(name)) for name, value in new.items()}}


def _first(setting: Any, other: Any) -> Any:
    """A setting that decides wherever it has a value; ``other`` where it has none."""
    entries = setting if isinstance(setting, list) else [setting]
    if other is None or not isinstance(entries[0], Mapping):
        return setting
    rest = other if isinstance(other, list) else [other]
    if not isinstance(rest[0], Mapping):
        rest = [{"value": other}]
    return [*entries, *rest]


class _Reader:
    """Takes the section apart; what is wrong is noted, and reading goes on."""

    def __init__(self, method: Method, models: Sequence[ModelRef]) -> None:
        self.method, self.models = method, models
        self.faults: list[str] = []

    def outputs(self, section: Any) -> dict[str, Variant]:
        place = "neulig_fast.outputs"
        if not isinstance(section, Mapping) or not section:
            self.faults.append(f"{place}: must be a mapping of names of folders, got {section!r}")
            return {}
        found = {str(name): self.variant(f"{place}.{name}", v) for name, v in section.items()}
        if len(found) < len(section):
            self.faults.append(f"{place}: two names are the same folder's: {list(section)}")
        self.faults += [f"{place}.{name}: {f}" for name in section for f in _name_faults(name)]
        return found

    def sweep(self, section: Any) -> dict[str, Variant]:
        place = "neulig_fast.sweep"
        if not isinstance(section, Mapping) or not section:
            self.faults.append(
                f"{place}: must be a mapping of parameters to lists of values, got {section!r}"
            )
            return {}
        before = len(self.faults)
        for name, values in section.items():
            self.faults += self.parameter(place, name)
            self.faults += [f"{place}.{name}: {fault}" for fault in _value_faults(values)]
        if len(self.faults) > before:
            return {}
        count = prod(len(values) for values in section.values())
        if count > _MOST:
            self.faults.append(f"{place}: must ask for {_MOST} outputs at most, got {count}")
            return {}
        combined = [
            dict(zip(section, values, strict=True))
            for values in itertools.product(*section.values())
        ]
        found = {
            ",".join(f"{name}={_word(value)}" for name, value in each.items()): Variant(each)
            for each in combined
        }
        self.faults += [f"{place}: {fault}" for name in found for fault in _name_faults(name)]
        return found

    def variant(self, place: str, value: Any) -> Variant:
        section = {} if value is None else self.mapping(place, value)
        for key in section:
            if key not in _VARIANT:
                hint = did_you_mean(str(key), _VARIANT) or f" (known: {', '.join(_VARIANT)})"
                self.faults.append(f"{place}.{key}: unknown key{hint}")
        own = self.settings(f"{place}.parameters", section.get("parameters", {}))
        models: dict[ModelRef, Parameters] = {}
        listed = self.mapping(f"{place}.models", section.get("models", {}))
        for name, settings in listed.items():
            at = f"{place}.models.{name}"
            found = self.settings(at, settings, of_model=True)
            model = self.model(at, str(name))
            if model is not None and model in models:
                self.faults.append(f"{at}: {model} has parameters here already")
            elif model is not None:
                models[model] = found
        return Variant(own, models)

    def mapping(self, place: str, value: Any) -> Mapping[str, Any]:
        if isinstance(value, Mapping):
            return value
        self.faults.append(f"{place}: must be a mapping, got {value!r}")
        return {}

    def settings(self, place: str, value: Any, of_model: bool = False) -> Parameters:
        section = self.mapping(place, value)
        for name, setting in section.items():
            self.faults += self.parameter(place, name, of_model)
            self.faults += [f"{place}.{name}: {fault}" for fault in parameters.faults(setting)]
        return section

    def parameter(self, place: str, name: Any, of_model: bool = False) -> Iterator[str]:
        known = self.method.parameters
        if name not in known:
            listed = f" (known: {', '.join(known)})" if known else ""
            hint = did_you_mean(str(name), known) or listed
            yield f"{place}.{name}: {self.method.name} has no such parameter{hint}"
        elif name == self.method.beside:
            yield f"{place}.{name}: is read once for all outputs, and cannot differ between them"
        elif of_model and not known[name].each:
            yield f"{place}.{name}: is of the merge, not of a model; it belongs under parameters"

    def model(self, place: str, name: str) -> ModelRef | None:
        """The one model of that path, or whose path ends with it."""
        name = name.rstrip("/")
        paths = {m: {str(m).rstrip("/"), m.path.rstrip("/")} for m in self.models}
        found = [m for m in self.models if name in paths[m]]
        found = found or [m for m in self.models if any(p.endswith(f"/{name}") for p in paths[m])]
        if len(found) == 1:
            return found[0]
        if found:
            self.faults.append(f"{place}: may be {' or '.join(map(str, found))}: write more of it")
        else:
            ends = {path.rpartition("/")[2] for each in paths.values() for path in each}
            hint = did_you_mean(name, sorted(ends.union(*paths.values())))
            listed = ", ".join(map(str, self.models))
            self.faults.append(f"{place}: there is no such model{hint or f' (known: {listed})'}")
        return None


def _name_faults(name: Any) -> Iterator[str]:
    if isinstance(name, bool):
        yield "YAML reads yes, no, on and off as true or false: put the name in quotes"
    elif name in (INDEX, SINGLE, MANIFEST):
        yield f"a checkpoint has a file of this name, got {name!r}"
    elif not _NAME.fullmatch(str(name)):
        yield f"folders' names are of letters, digits, _ . + = , and -, got {name!r}"


def _value_faults(values: Any) -> Iterator[str]:
    if not isinstance(values, list) or not values:
        yield f"must be a list of values, got {values!r}"
        return
    for k, value in enumerate(values):
        if isinstance(value, list | Mapping):
            yield f"must have one value in each place, got {value!r}; name such outputs yourself"
        else:
            yield from parameters.faults(value)
            if value in values[:k]:
                yield f"has {value!r} twice"


def _word(value: Any) -> str:
    """As YAML writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)
