"""LoRA adapters in peft's format, put on a model's tensors without making the model.

A matrix W (out, in) becomes ``W + s B A`` with A (r, in), B (out, r) and ``s = alpha / r`` (LoRA,
arXiv:2106.09685), or ``s = alpha / sqrt(r)`` (rsLoRA, arXiv:2312.03732). Of what stores its matrix
as (in, out), and of embeddings (words, width), it is the transpose of ``B A`` that is added. What
an adapter holds besides (``modules_to_save``, biases) takes the place of the model's.

Only headers are read. Every tensor of an adapter has to be of use, and every key of its
configuration known: a variant that changes what the matrices mean is refused, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

from .._checks import did_you_mean, raise_all
from . import dtypes
from .checkpoint import Checkpoint, json_object, open_checkpoint
from .headers import Entry
from .low_rank import LowRank

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_SHOWN = 20  # names that others are suggested for: a wrong model would have thousands
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>|embedding_)(?P<which>[AB])(?P<end>\.weight)?")
# Keys of configurations that do not change what the matrices mean, or that are read here.
_KNOWN = frozenset(
    (
        *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config"),
        *("eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights"),
        *("layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout"),
        *("lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_type"),
        *("peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config"),
        *("target_modules", "task_type", "use_rslora"),
    )
)
# Other ways to begin change the model's own weights too.
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


class Settings(NamedTuple):
    """What an adapter's configuration says."""

    rank: int
    alpha: float
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]
    root: bool
    transposed: bool

    def rank_of(self, module: str) -> int:
        """Of a module's matrices."""
        return _matching(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What a module's product is multiplied by."""
        rank = self.rank_of(module)
        return _matching(self.alphas, module, self.alpha) / (sqrt(rank) if self.root else rank)


def adapted(model: Checkpoint, folder: Path, who: str) -> Checkpoint:
    """A model with an adapter on it.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        who: the two, for messages.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: a configuration or tensors that do not make sense on this model; all faults.
    """
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None or not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{who}: {folder} needs {CONFIG} and {WEIGHTS[0]} of an adapter")
    content = json_object(folder / CONFIG, (folder / CONFIG).read_bytes())
    faults = list(_config_faults(content))
    raise_all(f"{who}: {CONFIG}", faults)
    adapter = open_checkpoint(weights)
    fitting = _Fitting(model, _settings(content))
    entries = fitting.entries(adapter)
    raise_all(who, fitting.faults)
    beside = (*model.beside, folder / CONFIG)
    return model._replace(entries=entries, beside=beside, notes=(*model.notes, *adapter.notes))


# -- the configuration ----------------------------------------------------------------------------


def _config_faults(content: Mapping[str, Any]) -> Iterator[str]:
    if content.get("peft_type") != "LORA":
        yield f"peft_type must be LORA, got {content.get('peft_type')!r}"
        return
    for key, value in content.items():
        if key not in _KNOWN and value:
            yield f"{key} = {str(value)[:40]} is not supported; merge the adapter with peft first"
    if content.get("init_lora_weights") not in _BEGINNINGS:
        yield (
            f"init_lora_weights = {content['init_lora_weights']!r} changes the model's own "
            "weights; save the adapter converted to plain LoRA"
        )
    if type(content.get("r")) is not int or content["r"] < 1:
        yield f"r must be 1 or more, got {content.get('r')!r}"
    if not _is_number(content.get("lora_alpha")):
        yield f"lora_alpha must be a number, got {content.get('lora_alpha')!r}"
    for key in ("use_rslora", "fan_in_fan_out"):
        if content.get(key) not in (None, True, False):
            yield f"{key} must be true or false, got {content[key]!r}"
    yield from _pattern_faults("rank_pattern", content.get("rank_pattern"), whole=True)
    yield from _pattern_faults("alpha_pattern", content.get("alpha_pattern"), whole=False)


def _pattern_faults(key: str, patterns: Any, whole: bool) -> Iterator[str]:
    if patterns is None:
        return
    if not isinstance(patterns, dict):
        yield f"{key} must be an object of names, got {str(patterns)[:40]}"
        return
    for pattern, value in patterns.items():
        right = type(value) is int and value >= 1 if whole else _is_number(value)
        if not right:
            yield f"{key}.{pattern} must be a {'count' if whole else 'number'}, got {value!r}"
        try:
            re.compile(_whole(pattern))
        except re.error as error:
            yield f"{key}.{pattern}: is no regular expression ({error})"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _settings(content: Mapping[str, Any]) -> Settings:
    return Settings(
        content["r"],
        content["lora_alpha"],
        content.get("rank_pattern") or {},
        content.get("alpha_pattern") or {},
        bool(content.get("use_rslora")),
        bool(content.get("fan_in_fan_out")),
    )


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that is a module's name, or what its name ends with."""
    for pattern, value in patterns.items():
        if re.match(_whole(pattern), module):
            return value
    return default


def _whole(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _is_replaced(name: str, adapter: Checkpoint) -> bool:
    """Whether it is of a module's state before ``modules_to_save``, which the adapter has too."""
    now = name.replace(".original_module.", ".")
    return now != name and now in adapter.entries


# -- the tensors ----------------------------------------------------------------------------------


class _Fitting:
    """Puts an adapter's tensors where they belong; notes those that belong nowhere."""

    def __init__(self, model: Checkpoint, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.faults: list[str] = []
        self._factors: dict[str, dict[str, Entry]] = {}

    def entries(self, adapter: Checkpoint) -> dict[str, Entry]:
        """The model's, with updates."""
        entries = dict(self.model.entries)
        for name, entry in adapter.entries.items():
            found = _FACTOR.fullmatch(name.removeprefix(_PREFIX))
            if not name.startswith(_PREFIX):
                self.faults.append(f"{name!r} does not begin with {_PREFIX}")
            elif found and bool(found["end"]) != bool(found["kind"]):
                factors = self._factors.setdefault(found["module"], {})
                factors[found["kind"] + found["which"]] = entry
            elif not _is_replaced(name, adapter):
                self._put(entries, name.removeprefix(_PREFIX), entry)
        if not self._factors and not self.faults:
            self.faults.append("the adapter has no LoRA matrices")
        for module, factors in self._factors.items():
            self._update(entries, module, factors)
        return entries

    def _put(self, entries: dict[str, Entry], name: str, entry: Entry) -> None:
        """A tensor that was trained as a whole."""
        name = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
        own = self._own(name, "the adapter has")
        if own is None:
            return
        if own.shape != entry.shape:
            got = f"{list(entry.shape)} in the adapter, {list(own.shape)} in the model"
            self.faults.append(f"{name!r} must have one shape, got {got}")
        entries[name] = entry._replace(name=name, like=own.dtype)

    def _update(self, entries: dict[str, Entry], module: str, factors: dict[str, Entry]) -> None:
        embedding = "embedding_" if any(key.startswith("embedding_") for key in factors) else ""
        keys = [embedding + "A", embedding + "B"]
        if sorted(factors) != keys:
            got = " and ".join(f"lora_{key}" for key in sorted(factors))
            wanted = " and ".join(f"lora_{key}" for key in keys)
            self.faults.append(f"{module!r} needs {wanted}, got {got}")
            return
        name = f"{module}.weight"
        if self._own(name, "the adapter is for") is None:
            return
        a, b = (factors[key] for key in keys)
        transposed = bool(embedding) or self.settings.transposed
        faults = list(self._shape_faults(module, entries[name], a, b, transposed))
        self.faults += faults
        if not faults:
            left, right = (a, b) if transposed else (b, a)
            update = LowRank(left, right, self.settings.scale_of(module), transposed)
            entries[name] = entries[name]._replace(update=update)

    def _shape_faults(
        self, module: str, own: Entry, a: Entry, b: Entry, transposed: bool
    ) -> Iterator[str]:
        kinds = {e.name: e.dtype for e in (own, a, b) if not dtypes.is_float(e.dtype)}
        if kinds:
            yield f"{module!r}: must be of floats, got {kinds}"
        shapes = f"A {list(a.shape)}, B {list(b.shape)} on a weight {list(own.shape)}"
        if min(len(a.shape), len(b.shape)) < 2 or any(n != 1 for n in b.shape[2:]):
            yield f"{module!r}: must have matrices, got {shapes}"
            return
        rank = self.settings.rank_of(module)
        if not a.shape[0] == b.shape[1] == rank:
            yield f"{module!r}: must have rank {rank}, got {shapes}"
            return
        plain, turned = (b.shape[0], *a.shape[1:]), (*a.shape[1:], b.shape[0])
        if own.shape != (turned if transposed else plain):
            hint = ""
            if own.shape in (plain, turned):
                hint = f"; fan_in_fan_out is {str(self.settings.transposed).lower()}"
            yield f"{module!r}: the shapes do not fit, got {shapes}{hint}"

    def _own(self, name: str, what: str) -> Entry | None:
        own = self.model.entries.get(name)
        if own is None:
            hint = did_you_mean(name, self.model.entries) if len(self.faults) < _SHOWN else ""
            self.faults.append(f"{what} {name!r}, the model has none{hint}")
        return own
