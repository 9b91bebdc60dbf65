"""The tokens of a model, from its ``tokenizer.json``, and the union of several models' tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .._checks import raise_all

FILE = "tokenizer.json"
_TABLES = ("BPE", "WordPiece", "WordLevel")  # whose vocabularies are tables; Unigram's is a list
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class Tokens(NamedTuple):
    """Tokens of a model.

    Attributes:
        ids: by token.
        content: of the file at ``path``.
    """

    ids: Mapping[str, int]
    content: Mapping[str, Any]
    path: Path

    @property
    def rows(self) -> int:
        """One more than the last id."""
        return max(self.ids.values(), default=-1) + 1

    def added(self) -> dict[str, Mapping[str, Any]]:
        """Records of those that are not of the tokenizer's own model."""
        return {record["content"]: record for record in self.content.get("added_tokens") or ()}


def read(folder: Path) -> Tokens | None:
    """Those of a folder; None where there is no ``tokenizer.json``.

    Raises:
        ValueError: a file that is not one of tokens with ids.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        pairs = list(_pairs(content))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as tokens with ids ({error})") from error
    faults = [
        f"{str(token)[:40]!r} has the id {str(number)[:20]}"
        for token, number in pairs
        if not isinstance(token, str) or type(number) is not int or not 0 <= number < 2**31
    ]
    raise_all(str(path), faults)
    return Tokens(dict(pairs), content, path)


def _pairs(content: Any) -> Iterator[tuple[Any, Any]]:
    model = content["model"]
    # Older files do not name the kind of those that have tables.
    kind = model.get("type", _TABLES[0])
    if kind == "Unigram":
        yield from ((entry[0], number) for number, entry in enumerate(model["vocab"]))
    elif kind in _TABLES:
        yield from model["vocab"].items()
    else:
        raise ValueError(f"its type is {kind!r}, none of {', '.join(_TABLES)}, Unigram")
    for record in content.get("added_tokens") or ():
        yield record["content"], record["id"]


def union(first: Tokens, others: Iterable[Tokens]) -> Tokens:
    """The first's tokens at their ids, then what others have besides, in order of their ids.

    What is new becomes an added token, so that texts are cut as by the first tokenizer, but where
    they hold such a token.

    Raises:
        ValueError: ids of the first that leave some out: new ones could not be appended.
    """
    if first.rows != len(set(first.ids.values())):
        raise ValueError(f"{first.path}: its ids leave some out: no tokens can be appended")
    ids, records = dict(first.ids), list(first.content.get("added_tokens") or ())
    number = first.rows
    for other in others:
        added = other.added()
        new = sorted((at, token) for token, at in other.ids.items() if token not in ids)
        for _, token in new:
            flags = dict.fromkeys(_FLAGS, False) | dict(added.get(token, {}))
            records.append(flags | {"id": number, "content": token})
            ids[token] = number
            number += 1
    return Tokens(ids, {**first.content, "added_tokens": records}, first.path)
