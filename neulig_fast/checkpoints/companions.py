"""The small files beside the weights: configuration, tokenizer, model card, the recipe itself."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._checks import raise_all
from .checkpoint import json_object
from .dtypes import TO_FORMAT
from .headers import INDEX
from .plan import Plan
from .recipe import ModelRef
from .tokens import FILE
from .vocabularies import Vocabulary

if TYPE_CHECKING:
    from .prepared import Prepared

RECIPE = "mergekit_config.yml"  # the name that mergekit gives it, and others look for
_CARD = "README.md"
_CACHED = "models--"  # what folders of models in Hugging Face's cache begin with
_TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json"),
)
# Vocabularies of tokenizers that do not read tokenizer.json; they know nothing of new tokens.
_WORDS = frozenset(
    (
        *("tokenizer.model", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
        *("spiece.model", "sentencepiece.bpe.model"),
    )
)
_CONFIG = "config.json"
_MODEL = (
    *(_CONFIG, "generation_config.json", "preprocessor_config.json", "open_clip_config.json"),
    *("processor_config.json", "video_preprocessor_config.json", "normalizer.json"),
)


def all_companions(every: Sequence[Prepared], out_dir: Path) -> dict[str, dict[str, bytes]]:
    """By name of a result: the small files beside its weights, made before there is work to lose.

    Raises:
        ValueError: a result would take the place of what it is made from; a broken configuration.
    """
    read = [file for checkpoint in every[0].models.values() for file in checkpoint.files]
    # Links may lead from the folder to the files and to it from elsewhere.
    homes = {home: file for file in read for home in (file.parent.resolve(), file.resolve().parent)}
    raise_all(
        "merge",
        [
            f"{out_dir / one.name}: {homes[home]} is there, which the merge reads and would "
            "replace: name another folder"
            for one in every
            if (home := (out_dir / one.name).resolve()) in homes
        ],
    )
    fetched = {part for file in read for part in file.parts if part.startswith(_CACHED)}
    found: dict[str, dict[str, bytes]] = {}
    content = functools.cache(Path.read_bytes)  # one copy: it is kept until the merge ends
    for one in every:
        texts = _companions(one, fetched, content)
        index = one.plan.layout.index_text()
        found[one.name] = texts if index is None else {**texts, INDEX: index.encode()}
    return found


def _companions(
    one: Prepared, fetched: Set[str], content: Callable[[Path], bytes]
) -> dict[str, bytes]:
    """Name -> content of everything but weights and manifest.

    Args:
        one: whose recipe is kept as its file is, and whose tokenizer is the donor's by default.
        fetched: folders of Hugging Face's cache that models came from: these have pages there.
        content: of a file.

    Raises:
        ValueError: the donor's configuration is not one.
    """
    plan, vocabulary = one.plan, one.vocabulary or Vocabulary(one.plan.donor)
    donor, tokens = (_folder(one.models[model].path) for model in (plan.donor, vocabulary.source))
    found: dict[str, bytes] = {}
    for folder, names in ((donor, _MODEL), (tokens, _TOKENIZER)):
        found |= {name: content(folder / name) for name in names if (folder / name).is_file()}
    if _CONFIG in found:
        found[_CONFIG] = _config(donor / _CONFIG, found[_CONFIG], plan, vocabulary.size)
    if vocabulary.text is not None:
        found = {name: text for name, text in found.items() if name not in _WORDS}
        found[FILE] = vocabulary.text
    found[RECIPE] = one.source
    found[_CARD] = _card(one, fetched).encode()
    return found


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _config(path: Path, text: bytes, plan: Plan, words: int | None) -> bytes:
    """The donor's, with what the merge changes: types of weights, numbers of layers and words."""
    content = json_object(path, text)
    stored = {formatted: name for name, formatted in TO_FORMAT.items()}
    kinds = {tensor.output.dtype for tensor in plan.tensors if tensor.output.dtype in stored}
    if len(kinds) == 1:
        key = "dtype" if "dtype" in content else "torch_dtype"
        content[key] = stored[kinds.pop()]
    for layers in plan.layers:
        _tell(content, layers.keys, layers.number, layers.anew)
    if words is not None:
        _tell(content, ("vocab_size", "text_config.vocab_size"), words)
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def _tell(content: dict[str, Any], keys: Sequence[str], number: int, anew: bool = False) -> None:
    """Put a number wherever a configuration has one of the keys.

    Args:
        anew: to a configuration that has none of them too, at the first.
    """
    places = []
    for key in keys:
        section, _, last = key.rpartition(".")
        inner = content.get(section) if section else content
        if isinstance(inner, dict):
            places.append((inner, last))
    for inner, last in [p for p in places if p[1] in p[0]] or places[: int(anew)]:
        inner[last] = number


def _card(one: Prepared, fetched: Set[str]) -> str:
    recipe, method = one.recipe, one.plan.method
    command = f"neulig-fast merge {RECIPE} FOLDER" + (f" --seed {one.seed}" if one.seed else "")
    models = "\n".join(f"* {_linked(model, fetched)}" for model in recipe.models())
    named = [part for model in recipe.models() for part in (model, model.lora) if part is not None]
    pages = dict.fromkeys(f"- {part.path}\n" for part in named if _has_page(part, fetched))
    front = "base_model:\n" + "".join(pages) if pages else ""
    return f"""---
{front}library_name: transformers
tags:
- merge
- neulig-fast
---
# A merge of {len(recipe.models())} models

Made by neulig-fast with **{method.title}** ({method.source}).

## Models

{models}

## Recipe

`{command}` makes it again.

```yaml
{one.source.decode("utf-8", "replace").rstrip()}
```
"""


def _linked(model: ModelRef, fetched: Set[str]) -> str:
    has_page = _has_page(model, fetched)
    return f"[{model}](https://huggingface.co/{model.path})" if has_page else f"`{model}`"


def _has_page(model: ModelRef, fetched: Set[str]) -> bool:
    return _CACHED + model.path.replace("/", "--") in fetched
