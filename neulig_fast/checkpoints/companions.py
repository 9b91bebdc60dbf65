"""The small files beside the weights: configuration, tokenizer, model card, the recipe itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .dtypes import TO_FORMAT
from .plan import Plan
from .recipe import ModelRef, Recipe
from .tokens import FILE
from .vocabularies import Vocabulary

RECIPE = "mergekit_config.yml"  # the name that mergekit gives it, and others look for
_CARD = "README.md"
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
) -> dict[str, bytes]:
    """Name -> content of everything but weights and manifest.

    Args:
        source: the recipe's file, which is kept as it is.
        folders: of the models.
        vocabulary: whose tokenizer the result has; by default the donor's.
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
    found[_CARD] = _card(recipe, source, plan).encode()
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


def _card(recipe: Recipe, source: bytes, plan: Plan) -> str:
    models = "\n".join(f"* {_linked(model)}" for model in recipe.models())
    named = [part for model in recipe.models() for part in (model, model.lora) if part is not None]
    front = "\n".join(dict.fromkeys(f"- {part.path}" for part in named))
    return f"""---
base_model:
{front}
library_name: transformers
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


def _linked(model: ModelRef) -> str:
    is_id = model.path.count("/") == 1 and not model.path.startswith((".", "/", "~"))
    return f"[{model}](https://huggingface.co/{model.path})" if is_id else f"`{model}`"
