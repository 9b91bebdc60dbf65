"""Recipes: what is to be merged how. A YAML file becomes one in :mod:`.recipe_file`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class ModelRef:
    """A model by path or Hugging Face id, at a revision, perhaps with a LoRA adapter on top."""

    path: str
    revision: str | None = None
    lora: ModelRef | None = None

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """``path@revision+lora_path@revision``; all but the first path may be missing.

        Raises:
            ValueError: an empty path or revision, or more than one adapter.
        """
        model, *adapters = text.split("+")
        if len(adapters) > 1:
            raise ValueError(f"must have one LoRA adapter at most, got {text!r}")
        path, *revision = model.split("@")
        if len(revision) > 1 or not path or "" in revision or "" in adapters:
            raise ValueError(f"must be path[@revision][+lora[@revision]], got {text!r}")
        lora = cls.parse(adapters[0]) if adapters else None
        return cls(path, revision[0] if revision else None, lora)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.path}{revision}{f'+{self.lora}' if self.lora else ''}"


@dataclass(frozen=True)
class Source:
    """A model, or layers ``[start, stop)`` of it, with parameters of its own."""

    model: ModelRef
    layers: tuple[int, int] | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Sources that are merged with each other; a model is made of slices one after the other."""

    sources: tuple[Source, ...]
    base: ModelRef | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """Slices of one module of a model, or of the whole."""

    slices: tuple[Slice, ...]
    base: ModelRef | None = None
    parameters: Parameters = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One of several results: values of parameters that it has in the place of the file's."""

    parameters: Parameters = field(default_factory=dict)
    models: Mapping[ModelRef, Parameters] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A whole file.

    Attributes:
        method: mergekit's name, or ours.
        parts: by module; ``""`` is the whole model.
        base: the base model, for methods of task vectors.
        parameters: of the outermost scope.
        dtype: of computing and storing, as mergekit means it; None is the models' own.
        out_dtype: of storing, where it differs.
        tokenizer: ``union``, ``base`` or a model; or mergekit's mapping.
        ours: the section ``neulig_fast``.
        variants: by the name of its folder each of several results that are asked for.
        beside: what the result is made from besides models and this file.
        warnings: what was read over, in words.
    """

    method: str
    parts: Mapping[str, Part]
    base: ModelRef | None = None
    parameters: Parameters = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: str | Mapping[str, Any] | None = None
    ours: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Variant] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def scopes(self) -> Iterator[tuple[Parameters, ModelRef | None]]:
        """Everything under ``parameters``, and of which model it is, if of one."""
        yield self.parameters, None
        for part in self.parts.values():
            yield part.parameters, None
            for piece in part.slices:
                yield piece.parameters, None
                yield from ((source.parameters, source.model) for source in piece.sources)

    def models(self) -> list[ModelRef]:
        """Every model that is read, each once, in the order of the file; the base last."""
        named = [
            source.model
            for part in self.parts.values()
            for piece in part.slices
            for source in piece.sources
        ]
        bases = [piece.base for part in self.parts.values() for piece in part.slices]
        bases += [part.base for part in self.parts.values()] + [self.base]
        return list(dict.fromkeys([*named, *(base for base in bases if base is not None)]))
