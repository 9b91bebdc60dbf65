"""mergekit's YAML, taken verbatim: from the content of a file to a recipe.

Exactly one of ``models``, ``slices`` and ``modules`` says what is merged; ``models`` is one slice
of all layers, the module ``default`` all of a model. Keys that are neither mergekit's nor ours are
warned of, since files of other versions have some; keys below ``neulig_fast``, our own, are errors,
and in a file that has that section so are parameters that are almost one there is. Every fault of a
file is found at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .._checks import did_you_mean, raise_all
from . import parameters, portland, variants
from .pieces import parity_of
from .recipe import ModelRef, Parameters, Part, Recipe, Slice, Source

if TYPE_CHECKING:
    from ..methods import Method

# mergekit's keys, by what they stand in.
_TOP = (
    *("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype"),
    *("out_dtype", "tokenizer_source", "tokenizer", "chat_template", "name", "neulig_fast"),
)
_PART = ("models", "slices", "parameters", "base_model", "merge_method")
_SLICE = ("sources", "base_model", "residual_weight", "parameters")
_MODEL = ("model", "parameters")
_SOURCE = ("model", "layer_range", "parameters")
_TOKENIZER = ("source", "tokens", "pad_to_multiple_of")
# Our own section: what mergekit's files cannot say.
_OURS = ("parity", "scope", *portland.KEYS, *variants.KEYS)
DTYPES = ("float32", "bfloat16", "float16", "float64")
PARAMETERS = (
    *("weight", "density", "gamma", "epsilon", "lambda", "normalize", "rescale", "int8_mask", "t"),
    *("scale", "select_topk", "filter_wise", "nuslerp_flatten", "nuslerp_row_wise", "alpha", "r"),
    *("normalize_weights", "eps", "max_iter", "tol", "decay", "schedule", "tall_mask_lambda", "k"),
    *("fisher", "floor", "majority_sign_method", "merge_func", "threshold"),
)
_WHOLE = "default"  # mergekit's only module of most models
_MODELS = ("fisher",)  # parameters that name a model


def parse(content: Any, methods: Mapping[str, Method]) -> Recipe:
    """A recipe from the content of a YAML file.

    Args:
        methods: all that there are, by name.

    Raises:
        ValueError: everything that is wrong, each under its place in the file.
    """
    recipe, faults = read(content, methods)
    raise_all("recipe", faults)
    return recipe


def read(content: Any, methods: Mapping[str, Method]) -> tuple[Recipe, list[str]]:
    """What can be read of a file's content, and everything that is wrong with it."""
    if not isinstance(content, Mapping):
        what = "is empty" if content is None else f"holds a {type(content).__name__}"
        wanted = "expected keys such as merge_method and models"
        return Recipe("", {}), [f"{what}, {wanted}"]
    reader = _Reader(ours="neulig_fast" in content)
    reader.keys("", content, _TOP)
    if content.get("chat_template") is not None:
        reader.warnings.append("chat_template: is not read; the result has its tokenizer's own")
    recipe = Recipe(
        method=reader.method(content.get("merge_method"), list(methods)),
        parts=reader.parts(content),
        base=reader.model("base_model", content.get("base_model")),
        parameters=reader.parameters("parameters", content.get("parameters")),
        dtype=reader.word("dtype", content.get("dtype"), DTYPES),
        out_dtype=reader.word("out_dtype", content.get("out_dtype"), DTYPES),
        tokenizer=reader.tokenizer(content),
        ours=reader.ours(content.get("neulig_fast")),
        warnings=tuple(reader.warnings),
    )
    faults = reader.faults
    if recipe.method in methods:
        method = methods[recipe.method]
        several, more = variants.read(recipe, method)
        warned = (*recipe.warnings, *dict.fromkeys(_unread(recipe, method)))
        recipe = replace(recipe, variants=several, warnings=warned)
        faults = [*faults, *more]
    return recipe, faults


def _unread(recipe: Recipe, method: Method) -> Iterator[str]:
    """Parameters that the method does not have, or that a model has and the merge should."""
    pieces = [piece for part in recipe.parts.values() for piece in part.slices]
    scopes = [recipe.parameters, *(part.parameters for part in recipe.parts.values())]
    own = [source.parameters for piece in pieces for source in piece.sources]
    scopes = [*scopes, *(piece.parameters for piece in pieces)]
    for scope in (*scopes, *own):
        for name in scope:
            if name not in method.parameters and name in PARAMETERS and name != "int8_mask":
                yield f"parameters.{name}: {method.name} has no such parameter, it is not read"
    for name in dict.fromkeys(name for scope in own for name in scope):
        if name in method.parameters and not method.parameters[name].each:
            yield (
                f"parameters.{name}: is of the merge, not of a model: what models say of it is "
                "not read"
            )
    parity = parity_of(recipe, method)
    for name, readers in method.only.items():
        if parity not in readers and any(name in scope for scope in scopes):
            yield f"parameters.{name}: not read with parity {parity}"


class _Reader:
    """Takes a file apart; what is wrong or unknown is noted, and reading goes on."""

    def __init__(self, ours: bool) -> None:
        self._ours = ours  # a file for this program, not one of mergekit's
        self.faults: list[str] = []
        self.warnings: list[str] = []

    def keys(self, place: str, section: Mapping[Any, Any], known: tuple[str, ...]) -> None:
        for key in section:
            if key not in known:
                hint = did_you_mean(str(key), known)
                self.warnings.append(f"{_at(place, key)}: unknown key, not read{hint}")

    def mapping(self, place: str, value: Any, known: tuple[str, ...]) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            self.faults.append(f"{place}: must be a mapping, got {value!r}")
            return {}
        self.keys(place, value, known)
        return value

    def entries(self, place: str, value: Any) -> list[tuple[str, Any]]:
        if not isinstance(value, list) or not value:
            self.faults.append(f"{place}: must be a list that is not empty, got {value!r}")
            return []
        return [(f"{place}.{k}", entry) for k, entry in enumerate(value)]

    def method(self, value: Any, methods: list[str]) -> str:
        if value not in methods:
            hint = did_you_mean(str(value), methods) or f" (known: {', '.join(methods)})"
            what = "is missing" if value is None else f"there is no {value!r}"
            self.faults.append(f"merge_method: {what}{hint}")
        return str(value)

    def parts(self, content: Mapping[str, Any]) -> dict[str, Part]:
        given = [key for key in ("models", "slices", "modules") if content.get(key) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            self.faults.append(f"must have exactly one of models, slices and modules, got {got}")
        if given != ["modules"]:
            return {"": self.part("", content)} if len(given) == 1 else {}
        modules = content["modules"]
        if not isinstance(modules, Mapping) or not modules:
            self.faults.append(f"modules: must be a mapping of modules, got {modules!r}")
            return {}
        found = {str(n): self.module(f"modules.{n}", part) for n, part in modules.items()}
        for name, part in modules.items():
            self.whole_merge(f"modules.{name}", part, content)
        return {"": found[_WHOLE]} if set(found) == {_WHOLE} else found

    def module(self, place: str, value: Any) -> Part:
        section = self.mapping(place, value, _PART)
        given = [key for key in ("models", "slices") if section.get(key) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            self.faults.append(f"{place}: must have exactly one of models and slices, got {got}")
            return Part(())
        return Part(
            self.part(place, section).slices,
            self.model(_at(place, "base_model"), section.get("base_model")),
            self.parameters(_at(place, "parameters"), section.get("parameters")),
        )

    def whole_merge(self, place: str, value: Any, content: Mapping[str, Any]) -> None:
        """Of what is of the whole merge: another method, another base in one module."""
        section = value if isinstance(value, Mapping) else {}
        outer = {key: content.get(key) for key in ("merge_method", "base_model")}
        own = {key: section[key] for key in outer if section.get(key) not in (None, outer[key])}
        if "merge_method" in own:
            self.faults.append(
                f"{place}.merge_method: all modules have one method, {outer['merge_method']!r} "
                f"(in mergekit too, which does not read it here), got {own['merge_method']!r}"
            )
        if "base_model" in own:
            self.warnings.append(f"{place}.base_model: is read, which mergekit does not do here")

    def part(self, place: str, section: Mapping[str, Any]) -> Part:
        if section.get("models") is not None:
            models = self.entries(_at(place, "models"), section["models"])
            return Part((Slice(tuple(self.source(at, m, _MODEL) for at, m in models)),))
        slices = self.entries(_at(place, "slices"), section["slices"])
        return Part(tuple(self.slice(at, piece) for at, piece in slices))

    def slice(self, place: str, value: Any) -> Slice:
        section = self.mapping(place, value, _SLICE)
        if section.get("residual_weight") is not None:
            self.warnings.append(f"{place}.residual_weight: has no meaning and is not read")
        sources = self.entries(f"{place}.sources", section.get("sources"))
        found = tuple(self.source(at, source, _SOURCE) for at, source in sources)
        lengths = {s.layers[1] - s.layers[0] for s in found if s.layers is not None}
        if len(lengths) > 1:
            counts = sorted(lengths)
            self.faults.append(f"{place}: sources must have as many layers each, got {counts}")
        base = self.model(f"{place}.base_model", section.get("base_model"))
        own = self.parameters(f"{place}.parameters", section.get("parameters"))
        return Slice(found, base, own)

    def source(self, place: str, value: Any, known: tuple[str, ...]) -> Source:
        section = self.mapping(place, value, known)
        if section and section.get("model") is None:
            self.faults.append(f"{place}.model: is missing")
        model = self.model(f"{place}.model", section.get("model")) or ModelRef("")
        layers = section.get("layer_range") if "layer_range" in known else None
        if layers is not None and not _is_range(layers):
            self.faults.append(
                f"{place}.layer_range: must be [first, after the last], got {layers!r}"
            )
            layers = None
        own = self.parameters(f"{place}.parameters", section.get("parameters"))
        return Source(model, None if layers is None else (layers[0], layers[1]), own)

    def model(self, place: str, value: Any) -> ModelRef | None:
        if value is None:
            return None
        try:
            return ModelRef.parse(self.text(place, value) or "")
        except ValueError as error:
            if isinstance(value, str):
                self.faults.append(f"{place}: {error}")
            return None

    def parameters(self, place: str, value: Any) -> Parameters:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.faults.append(f"{place}: must be a mapping, got {value!r}")
            return {}
        section: Parameters = value
        for name in section:
            if name not in PARAMETERS:
                hint = did_you_mean(str(name), PARAMETERS)
                fault = f"{_at(place, name)}: unknown key"
                if hint and self._ours:
                    self.faults.append(f"{fault}{hint}")
                else:
                    self.warnings.append(f"{fault}, not read{hint}")
        for name, setting in section.items():
            self.faults += [f"{_at(place, name)}: {f}" for f in parameters.faults(setting)]
            if name in _MODELS:
                self.model(_at(place, name), setting)
        return section

    def word(self, place: str, value: Any, known: tuple[str, ...]) -> str | None:
        if value is not None and value not in known:
            hint = did_you_mean(str(value), known)
            self.faults.append(f"{place}: must be one of {', '.join(known)}, got {value!r}{hint}")
        return value

    def text(self, place: str, value: Any) -> str | None:
        if value is not None and not isinstance(value, str):
            self.faults.append(f"{place}: must be text, got {value!r}")
            return None
        return value

    def tokenizer(self, content: Mapping[str, Any]) -> str | Mapping[str, Any] | None:
        source, section = content.get("tokenizer_source"), content.get("tokenizer")
        if source is not None and section is not None:
            self.faults.append("must have one of tokenizer_source and tokenizer at most, got both")
        if section is not None:
            return self.mapping("tokenizer", section, _TOKENIZER)
        return self.text("tokenizer_source", source)

    def ours(self, value: Any) -> Mapping[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.faults.append(f"neulig_fast: must be a mapping, got {value!r}")
            return {}
        for key in value:
            if key not in _OURS:
                hint = did_you_mean(str(key), _OURS) or f" (known: {', '.join(_OURS)})"
                self.faults.append(f"neulig_fast.{key}: unknown key{hint}")
        return value


def _at(place: str, key: Any) -> str:
    return f"{place}.{key}" if place else str(key)


def _is_range(value: Any) -> bool:
    pair = isinstance(value, list) and len(value) == 2
    # [0, 0] is of a module without layers.
    return (
        pair
        and all(type(n) is int for n in value)
        and (0 <= value[0] < value[1] or value == [0, 0])
    )
