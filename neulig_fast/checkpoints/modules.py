"""Models of several modules: which tensors and which layers each has, by architecture.

A module is told by the beginnings of its tensors' names, the longest that fits. The names of
modules, and what is of which, are mergekit's (0.1.5); some checkpoints of the same architectures
have ``model.`` before their names, and are read too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from .._checks import did_you_mean, one_line_each, raise_all
from .checkpoint import Checkpoint, json_object
from .headers import Entry
from .recipe import ModelRef, Part, Recipe

CONFIG = "config.json"
Models = Mapping[ModelRef, Checkpoint]


class Module(NamedTuple):
    """A part of a model, or all of it.

    Attributes:
        prefixes: of its tensors' names.
        layers: where ``config.json`` may have the number of its layers; empty where it has none
            that could be cut.
        first: parts of names of what runs before the layers, besides embeddings.
        whole: the number of layers that a file may name to mean all of a module without any.
    """

    prefixes: tuple[str, ...] = ("",)
    layers: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    whole: int = 0


class Own(NamedTuple):
    """What one module, or a whole model, is merged of: its tensors of all models."""

    recipe: Recipe
    models: Models
    module: Module


# Where a model has one stack of layers, and nothing else is known of it.
ANY = Module(layers=("num_hidden_layers", "n_layer", "num_layers", "n_layers"))
_TEXT, _VISION = "text_config.num_hidden_layers", "vision_config.num_hidden_layers"


def _either(*prefixes: str) -> tuple[str, ...]:
    return (*prefixes, *(f"model.{prefix}" for prefix in prefixes))


def _towers(name: str, *first: str) -> dict[str, Module]:
    """A language model and a tower beside each other."""
    return {
        "text_decoder": Module((*_either("language_model."), "lm_head."), (_TEXT,)),
        "multi_modal_projector": Module(_either("multi_modal_projector.")),
        name: Module(_either(f"{name}."), (_VISION,), first),
    }


def _qwen(whole: int) -> dict[str, Module]:
    """A tower with the projector in it."""
    merger = _either("visual.merger.", "visual.deepstack_merger_list.")
    return {
        "text_decoder": Module(("model.", "lm_head."), (_TEXT, "num_hidden_layers")),
        "multi_modal_projector": Module(merger, whole=whole),
        "vision_tower": Module(_either("visual."), ("vision_config.depth",)),
    }


ARCHITECTURES: Mapping[str, Mapping[str, Module]] = {
    "Gemma3ForConditionalGeneration": _towers("vision_tower"),
    "Llama4ForConditionalGeneration": _towers("vision_model", "layernorm_pre."),
    "Mistral3ForConditionalGeneration": _towers("vision_tower", "patch_conv.", "ln_pre."),
    "Qwen2VLForConditionalGeneration": _qwen(whole=2),
    "Qwen2_5_VLForConditionalGeneration": _qwen(whole=2),
    "Qwen3VLForConditionalGeneration": _qwen(whole=3),
    "Qwen3VLMoeForConditionalGeneration": _qwen(whole=3),
    "T5ForConditionalGeneration": {
        "decoder": Module(("decoder.",), ("num_decoder_layers",)),
        "encoder": Module(("encoder.",), ("num_layers", "num_hidden_layers")),
        "shared": Module(("shared.", "lm_head.")),
    },
    "WhisperForConditionalGeneration": {
        "decoder": Module(("model.decoder.", "proj_out."), ("decoder_layers",)),
        "encoder": Module(
            ("model.encoder.",), ("encoder_layers", "num_hidden_layers"), ("conv1.", "conv2.")
        ),
    },
}


def split(recipe: Recipe, models: Models) -> tuple[list[Own], list[str]]:
    """A recipe and its models by module, each to be merged as a model of its own; warnings.

    Args:
        models: all that are read.

    Raises:
        ValueError: models of an unknown or of several architectures, a module that they do not
            have, layers of one without any, tensors of no module; all of one kind.
    """
    if set(recipe.parts) == {""}:
        return [Own(recipe, models, ANY)], []
    architecture = _architecture(recipe, models)
    known = ARCHITECTURES[architecture]
    raise_all("merge", _part_faults(recipe, architecture))
    homes = {model: placed(checkpoint.entries, known) for model, checkpoint in models.items()}
    lost = [
        (f"{model} has ", repr(name), f", of no module of {architecture}")
        for model in recipe.models()
        for name, module in homes[model].items()
        if module is None
    ]
    raise_all("merge", one_line_each(lost))
    found = []
    for name, part in recipe.parts.items():
        own = replace(recipe, parts={"": _uncut(part) if not known[name].layers else part})
        within = {
            model: checkpoint._replace(entries=_of(name, checkpoint, homes[model]))
            for model, checkpoint in models.items()
        }
        found.append(Own(own, within, known[name]))
    left = [name for name in known if name not in recipe.parts]
    warned = f"modules: {', '.join(left)} of {architecture} not named, and not in the result"
    return found, [warned] if left else []


def placed(tensors: Iterable[str], known: Mapping[str, Module]) -> dict[str, str | None]:
    """By tensor, the name of its module; None where it is of none."""
    prefixes = {prefix: name for name, module in known.items() for prefix in module.prefixes}
    longest = sorted(prefixes, key=len, reverse=True)
    return {
        tensor: next((prefixes[p] for p in longest if tensor.startswith(p)), None)
        for tensor in tensors
    }


def _of(name: str, checkpoint: Checkpoint, homes: Mapping[str, str | None]) -> dict[str, Entry]:
    return {tensor: e for tensor, e in checkpoint.entries.items() if homes[tensor] == name}


def _architecture(recipe: Recipe, models: Models) -> str:
    """The one that all models have."""
    found: dict[str, ModelRef] = {}
    faults = []
    for model in recipe.models():
        try:
            found.setdefault(_named(models[model]), model)
        except ValueError as error:
            faults.append(str(error))
    for name, model in found.items():
        if name not in ARCHITECTURES:
            faults.append(
                f"modules: {model} is a {name}, whose modules are not known (known: "
                f"{', '.join(ARCHITECTURES)}); models, without modules, merges all tensors at "
                "once, and filters, parts of their names, give each module its parameters"
            )
    if len(found) > 1:
        got = ", ".join(f"{name} ({model})" for name, model in found.items())
        faults.append(f"modules: models must be of one architecture, got {got}")
    raise_all("merge", faults)
    return next(iter(found))


def _named(checkpoint: Checkpoint) -> str:
    path = checkpoint.path / CONFIG
    if not path.is_file():
        raise ValueError(f"modules need the architecture's name; there is no {path}")
    names = json_object(path, path.read_bytes()).get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ValueError(f"{path}: architectures must be a list of one name, got {names!r}")
    return names[0]


def _part_faults(recipe: Recipe, architecture: str) -> Iterator[str]:
    known = ARCHITECTURES[architecture]
    for name, part in recipe.parts.items():
        if name not in known:
            yield (
                f"modules.{name}: {architecture} has no such module (known: {', '.join(known)})"
                f"{did_you_mean(name, known)}"
            )
        elif not known[name].layers:
            yield from _cut_faults(name, part, known[name].whole)


def _cut_faults(name: str, part: Part, whole: int) -> Iterator[str]:
    if len(part.slices) > 1:
        yield f"modules.{name}: has no layers to stack, got {len(part.slices)} slices"
    ranges = {source.layers for piece in part.slices for source in piece.sources}
    for layers in sorted(ranges - {None, (0, whole)}, key=str):
        got = list(layers or ())
        yield f"modules.{name}: layer_range must be [0, {whole}], all of the module, got {got}"


def _uncut(part: Part) -> Part:
    """All of a module, of which a file may say that it has layers."""
    whole = (replace(s, layers=None) for s in part.slices[0].sources)
    return replace(part, slices=(replace(part.slices[0], sources=tuple(whole)),))
