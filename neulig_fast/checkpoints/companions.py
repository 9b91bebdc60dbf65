"""The small files beside the weights: configuration, tokenizer, model card, the recipe itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .dtypes import TO_FORMAT
from .plan import Plan
from .recipe import ModelRef, Recipe

RECIPE = "mergekit_config.yml"  # the name that mergekit gives it, and others look for
_CARD = "README.md"
_TOKENIZER = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json"),
)
_MODEL = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "open_clip_config.json"),
    "processor_config.json",
)


def companions(
    recipe: Recipe, source: bytes, plan: Plan, folders: Mapping[ModelRef, Path]
) -> dict[str, bytes]:
    """Name -> content of everything but weights and manifest.

    Args:
        source: the recipe's file, which is kept as it is.
        folders: of the models.
    """
    donor = folders[plan.donor]
    donor = donor if donor.is_dir() else donor.parent
    tokens = folders.get(_tokenizer_model(recipe, plan), donor)
    found: dict[str, bytes] = {}
    for folder, names in ((donor, _MODEL), (tokens, _TOKENIZER)):
        found |= {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
    if "config.json" in found:
        found["config.json"] = _config(found["config.json"], recipe, plan)
    found[RECIPE] = source
    found[_CARD] = _card(recipe, source, plan).encode()
    return found


def _tokenizer_model(recipe: Recipe, plan: Plan) -> ModelRef:
    named = recipe.tokenizer
    if not isinstance(named, str) or named in ("base", "union"):
        return plan.donor
    return ModelRef.parse(named)


def _config(text: bytes, recipe: Recipe, plan: Plan) -> bytes:
    """The donor's, with what the merge changes: the type of weights, the number of layers."""
    content = json.loads(text)
    stored = {formatted: name for name, formatted in TO_FORMAT.items()}
    kinds = {tensor.output.dtype for tensor in plan.tensors if tensor.output.dtype in stored}
    if len(kinds) == 1:
        key = "dtype" if "dtype" in content else "torch_dtype"
        content[key] = stored[kinds.pop()]
    if len(plan.layers) == 1 and "num_hidden_layers" in content:
        content["num_hidden_layers"] = next(iter(plan.layers.values()))
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def _card(recipe: Recipe, source: bytes, plan: Plan) -> str:
    models = "\n".join(f"* {_linked(model)}" for model in recipe.models())
    front = "\n".join(f"- {model.path}" for model in recipe.models())
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
