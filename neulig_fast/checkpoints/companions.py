"""The small files beside the weights: configuration, tokenizer, model card, the recipe itself."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path

from .dtypes import TO_FORMAT
from .plan import Plan
from .recipe import ModelRef, Recipe
from .tokens import FILE
from .vocabularies import Vocabulary

RECIPE = "mergekit_config.yml"  # the name that mergekit gives it, and others look for
_CARD = "README.md"
CACHED = "models--"  # what folders of models in Hugging Face's cache begin with
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
_MODEL = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "open_clip_config.json"),
    "processor_config.json",
)


def companions(
    recipe: Recipe,
    source: bytes,
    plan: Plan,
    folders: Mapping[ModelRef, Path],
    vocabulary: Vocabulary | None = None,
    fetched: Set[str] = frozenset(),
) -> dict[str, bytes]:
    """Name -> content of everything but weights and manifest.

    Args:
        source: the recipe's file, which is kept as it is.
        folders: of the models.
        vocabulary: whose tokenizer the result has; by default the donor's.
        fetched: folders of Hugging Face's cache that models came from: these have pages there.
    """
    vocabulary = vocabulary or Vocabulary(plan.donor)
    folders = {model: path if path.is_dir() else path.parent for model, path in folders.items()}
    donor, tokens = folders[plan.donor], folders[vocabulary.source]
    found: dict[str, bytes] = {}
    for folder, names in ((donor, _MODEL), (tokens, _TOKENIZER)):
        found |= {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if "config.json" in found:
        found["config.json"] = _config(found["config.json"], plan, vocabulary.size)
    if vocabulary.text is not None:
        found = {name: text for name, text in found.items() if name not in _WORDS}
        found[FILE] = vocabulary.text
    found[RECIPE] = source
    found[_CARD] = _card(recipe, source, plan, fetched).encode()
    return found


def _config(text: bytes, plan: Plan, words: int | None) -> bytes:
    """The donor's, with what the merge changes: types of weights, numbers of layers and words."""
    content = json.loads(text)
    stored = {formatted: name for name, formatted in TO_FORMAT.items()}
    kinds = {tensor.output.dtype for tensor in plan.tensors if tensor.output.dtype in stored}
    if len(kinds) == 1:
        key = "dtype" if "dtype" in content else "torch_dtype"
        content[key] = stored[kinds.pop()]
    if len(plan.layers) == 1 and "num_hidden_layers" in content:
        content["num_hidden_layers"] = next(iter(plan.layers.values()))
    if words is not None and "vocab_size" in content:
        content["vocab_size"] = words
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def _card(recipe: Recipe, source: bytes, plan: Plan, fetched: Set[str]) -> str:
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

Made by [neulig-fast](https://pypi.org/project/neulig-fast) with **{plan.method.title}**
({plan.method.source}).

## Models

{models}

## Recipe

`neulig-fast merge {RECIPE} FOLDER` makes it again.

```yaml
{source.decode("utf-8", "replace").rstrip()}
```
"""


def _linked(model: ModelRef, fetched: Set[str]) -> str:
    has_page = _has_page(model, fetched)
    return f"[{model}](https://huggingface.co/{model.path})" if has_page else f"`{model}`"


def _has_page(model: ModelRef, fetched: Set[str]) -> bool:
    return CACHED + model.path.replace("/", "--") in fetched
