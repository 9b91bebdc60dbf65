"""The demo's small CLIP: open_clip's own classes with a custom config, and its files.

Training runs on a vocabulary cut to the token ids that the prompts use; the published model has
open_clip's full vocabulary, so that the stock tokenizer works and open_clip loads the files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip import CLIP, SimpleTokenizer
from torch import Tensor

from .settings import DemoSettings, derived_seed
from .tasks import TaskData

MODEL_NAME = "neulig-demo"
CONTEXT = 16  # tokens
VOCABULARY = 49408


def model_config(settings: DemoSettings) -> dict[str, Any]:
    """open_clip's JSON config of the demo's model (0.84 M image-tower parameters by default)."""
    return {
        "embed_dim": 128,
        "vision_cfg": {
            "image_size": 32,
            "patch_size": 8,
            "width": settings.width,
            "layers": settings.layers,
            "head_width": 32,
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": VOCABULARY,
            "width": 64,
            "heads": 2,
            "layers": 2,
        },
    }


def tokenizer() -> SimpleTokenizer:
    """The stock tokenizer at the model's context length, as `open_clip.get_tokenizer` gives it."""
    return SimpleTokenizer(context_length=CONTEXT)


def build_model(settings: DemoSettings, vocabulary: int = VOCABULARY) -> CLIP:
    """A CLIP with seeded random weights; the global random state stays as it is."""
    config = model_config(settings)
    config["text_cfg"]["vocab_size"] = vocabulary
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(settings.seed, 0))
        return CLIP(**config)


def prompt_tokens(tasks: Sequence[TaskData]) -> Tensor:
    """Token ids (templates, classes of all tasks, 16) of every prompt.

    Raises:
        ValueError: the tasks have different numbers of templates.
    """
    counts = {task.name: len(task.templates) for task in tasks}
    if len(set(counts.values())) != 1:
        raise ValueError(f"prompt_tokens: tasks need equally many templates, got {counts}")
    encode = tokenizer()
    return torch.stack(
        [
            encode(
                [
                    row.format(name)
                    for task, row in zip(tasks, rows, strict=True)
                    for name in task.class_names
                ]
            )
            for rows in zip(*(task.templates for task in tasks), strict=True)
        ]
    )


def used_tokens(tasks: Sequence[TaskData]) -> Tensor:
    """Ascending ids (V,) of every token in the tasks' prompts, and of padding.

    Ascending, so that the end-of-text token stays the largest id, by which CLIP finds it.
    """
    return torch.unique(prompt_tokens(tasks))


def expand_vocabulary(model: CLIP, tokens: Tensor, settings: DemoSettings) -> CLIP:
    """The model over the full vocabulary: row i of its embedding moves to row tokens[i].

    Rows of tokens that no prompt uses keep a seeded initialisation.
    """
    full = build_model(settings)
    state = dict(model.state_dict())
    rows = full.token_embedding.weight.detach().clone()
    rows[tokens] = state["token_embedding.weight"]
    state["token_embedding.weight"] = rows
    full.load_state_dict(state)
    return full.eval()


def write_config(folder: str | Path, settings: DemoSettings) -> Path:
    """Write `neulig-demo.json`, which `open_clip.add_model_config(path)` reads."""
    path = Path(folder) / f"{MODEL_NAME}.json"
    path.write_text(json.dumps(model_config(settings), indent=2) + "\n")
    return path
