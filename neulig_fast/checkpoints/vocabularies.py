"""Models of different vocabularies, their embeddings brought into one order of tokens.

``tokenizer_source`` says which tokens the result has: the base's, another model's, or the union of
all. In every model that is merged, row i of embedding and head then belongs to token i of the
result. Where a model lacks a token, it gets the base's row; if the base lacks it too, the one that
some model has, or the mean of those of all that do: mergekit's rule.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .._checks import did_you_mean, raise_all
from . import names, tokens
from .checkpoint import Checkpoint
from .headers import Entry
from .recipe import ModelRef, Recipe
from .rows import MEAN, Rows
from .tokens import Tokens

_SHOWN = 8  # tokens of one message
Models = Mapping[ModelRef, Checkpoint]
# In names: tables not by token; embeddings of other names than most; heads and their biases.
_BY_PLACE = ("wpe", "position", "token_type", "segment")
_EMBEDDING = re.compile(r"(^|\.)(shared|emb)\.")
_HEAD = re.compile(r"lm_head|logits_bias|predictions\.(bias|decoder)|(^|\.)decoder\.bias$")


class Vocabulary(NamedTuple):
    """Tokens of the result.

    Attributes:
        source: the model whose tokenizer's files it has.
        size: rows of its embedding, where they are not as they were.
        text: of ``tokenizer.json``, where it is new.
    """

    source: ModelRef
    size: int | None = None
    text: bytes | None = None


def unified(recipe: Recipe, models: Models) -> tuple[Models, Vocabulary | None]:
    """Models as a recipe's tokenizer wants them, and what it is; None if it is not asked for.

    Raises:
        ValueError: a tokenizer that cannot be had, tokens that no model has a row for; all faults.
    """
    if recipe.tokenizer is None:
        return models, None
    choice, faults = _choice(recipe)
    base = recipe.base or recipe.models()[0]
    source = base if choice in ("base", "union") else ModelRef.parse(choice)
    if source not in models:
        known = [str(model) for model in models]
        faults.append(f"{choice} is not a model of this recipe{did_you_mean(choice, known)}")
    raise_all("tokenizer", faults)
    found = _tokens(models, required=choice == "union")
    own = found.get(source)
    if own is None:
        return _noted(models, source, bool(found)), Vocabulary(source)
    wanted = own
    if choice == "union":
        wanted = tokens.union(own, [t for model, t in found.items() if model != source])
    matcher = _Matcher(base, source, models, found, wanted)
    if all(matcher.fits(model) for model in found) and wanted.ids == own.ids:
        return models, Vocabulary(source)
    changed = {model: matcher.matched(model) for model in models}
    raise_all("tokenizer", matcher.faults)
    text = json.dumps(wanted.content, ensure_ascii=False, indent=2).encode()
    return changed, Vocabulary(source, wanted.rows, text if wanted.ids != own.ids else None)


def _noted(models: Models, source: ModelRef, others: bool) -> Models:
    """Models as they are, with a warning if ``others`` have tokens to be compared with."""
    if not others:
        return models
    checkpoint = models[source]
    note = f"{source} has no {tokens.FILE}: all models' tokens are taken for the same"
    return {**models, source: checkpoint._replace(notes=(*checkpoint.notes, note))}


def _choice(recipe: Recipe) -> tuple[str, list[str]]:
    section = recipe.tokenizer
    if isinstance(section, str):
        return section, []
    section = section or {}
    faults = [
        f"{key} is not supported; use source alone, and edit the result's tokenizer"
        for key in ("tokens", "pad_to_multiple_of")
        if section.get(key)
    ]
    choice = section.get("source", "union")
    if not isinstance(choice, str):
        faults.append(f"source must be union, base or a model, got {choice!r}")
    return str(choice), faults


def _tokens(models: Models, required: bool) -> dict[ModelRef, Tokens]:
    found, faults = {}, []
    for model, checkpoint in models.items():
        try:
            own = tokens.read(_folder(checkpoint))
        except ValueError as error:
            faults.append(str(error))
            continue
        if own is not None:
            found[model] = own
        elif required:
            faults.append(f"union needs {tokens.FILE} of every model; {model} has none")
    raise_all("tokenizer", faults)
    return found


class _Matcher:
    """Brings rows into the order of the wanted tokens."""

    def __init__(
        self,
        base: ModelRef,
        source: ModelRef,
        models: Models,
        found: Mapping[ModelRef, Tokens],
        wanted: Tokens,
    ) -> None:
        self.base, self.source, self.models = base, source, models
        self.found, self.wanted = found, wanted
        self.faults: list[str] = []
        self.order = {number: token for token, number in wanted.ids.items()}
        self.sizes = {model: _vocabulary_rows(models[model]) for model in found}
        self._rows: dict[tuple[ModelRef, ...], tuple] = {}

    def fits(self, model: ModelRef) -> bool:
        """Whether a model has the wanted tokens as it is, and as many rows as the others."""
        same = len(set(self.sizes.values())) == 1
        return same and self.found[model].ids == self.wanted.ids

    def matched(self, model: ModelRef) -> Checkpoint:
        """A model with rows in the wanted order."""
        checkpoint = self.models[model]
        if model not in self.found:
            note = f"{model} has no {tokens.FILE}: its tokens are taken for those of the result"
            return checkpoint._replace(notes=(*checkpoint.notes, note))
        entries, ordered = dict(checkpoint.entries), set(self._names(model))
        if not ordered:
            self._fault(f"{model}: no tensor is known for the embedding of its tokens")
        for name in _unordered(checkpoint, self.sizes[model], ordered):
            self._fault(f"{model}: {name} has values by token that cannot be reordered")
        for name in self._names(model):
            others = [m for m in self.found if m != model and name in self._names(m)]
            entries[name] = self._entry(name, (model, *others))
        beside = (*checkpoint.beside, _folder(checkpoint) / tokens.FILE)
        return checkpoint._replace(entries=entries, beside=beside)

    def _names(self, model: ModelRef) -> Iterator[str]:
        return _vocabulary_names(self.models[model], self.sizes[model])

    def _entry(self, name: str, whose: tuple[ModelRef, ...]) -> Entry:
        """A matrix of the first model's rows, and of the others' where it has none."""
        if whose not in self._rows:
            self._rows[whose] = self._where(whose)
        who, row, means = self._rows[whose]
        sources = tuple(self.models[model].entries[name] for model in whose)
        shape = (len(who), *sources[0].shape[1:])
        return sources[0]._replace(shape=shape, update=None, rows=Rows(sources, who, row, means))

    def _where(self, whose: tuple[ModelRef, ...]) -> tuple:
        who = np.zeros(self.wanted.rows, dtype=np.int32)
        row = np.zeros(self.wanted.rows, dtype=np.int64)
        means: dict[int, tuple[tuple[int, int], ...]] = {}
        lost = []
        for number in range(self.wanted.rows):
            having = self._having(number, whose)
            if not having:
                lost.append(self.order.get(number, f"id {number}"))
            elif having[0][0] == 0 or len(having) == 1:
                who[number], row[number] = having[0]
            else:
                based = [place for place in having if whose[place[0]] == self.base]
                who[number], row[number] = based[0] if based else (MEAN, 0)
                if not based:
                    means[number] = tuple(having)
        if lost:
            shown = ", ".join(repr(token) for token in lost[:_SHOWN])
            self._fault(f"{len(lost)} tokens have no row in any model: {shown}")
        return who, row, means

    def _having(self, number: int, whose: tuple[ModelRef, ...]) -> list[tuple[int, int]]:
        """Numbers of models that have a token, and its row there; of no token, the source's row."""
        token = self.order.get(number)
        if token is None:
            return [(k, number) for k, model in enumerate(whose) if model == self.source]
        found = [(k, self.found[model].ids.get(token)) for k, model in enumerate(whose)]
        return [(k, at) for k, at in found if at is not None and at < self.sizes[whose[k]]]

    def _fault(self, fault: str) -> None:
        if fault not in self.faults:
            self.faults.append(fault)


def _folder(checkpoint: Checkpoint) -> Path:
    return checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent


def _is_place(name: str) -> bool:
    """Whether a table is by position or segment, not by token."""
    return any(word in name.lower() for word in _BY_PLACE)


def _vocabulary_rows(checkpoint: Checkpoint) -> int:
    """Of the embedding of tokens: the longest matrix before the layers."""
    lengths = [
        entry.shape[0]
        for name, entry in checkpoint.entries.items()
        if names.split(name) is None
        and len(entry.shape) == 2
        and not _is_place(name)
        and (names.is_before_layers(name) or _EMBEDDING.search(name))
    ]
    return max(lengths, default=0)


def _vocabulary_names(checkpoint: Checkpoint, rows: int) -> Iterator[str]:
    """Tensors of no layer with a row for every token: embeddings, the head and its bias."""
    for name, entry in checkpoint.entries.items():
        matrix = len(entry.shape) == 2 or _HEAD.search(name)
        by_token = names.split(name) is None and not _is_place(name) and matrix
        if by_token and entry.shape[:1] == (rows,):
            yield name


def _unordered(checkpoint: Checkpoint, rows: int, ordered: set[str]) -> Iterator[str]:
    """What may have a value for every token but is not brought into order."""
    for name, entry in checkpoint.entries.items():
        if names.split(name) is None and name not in ordered and not _is_place(name):
            by_width = len(entry.shape) == 2 and entry.shape[1] == rows
            if _HEAD.search(name) and (by_width or entry.shape == (rows,)):
                yield name
