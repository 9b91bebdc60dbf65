"""``tests.common`` for mergekit's tests, whose release lacks it: small models, and a merge.

``tools/test_hosts.sh`` puts it there. Names and arguments are those that the tests use.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from mergekit.config import MergeConfiguration
from mergekit.io import LazyTensorLoader
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
}


def _saved(model: Any, path: object) -> str:
    model.save_pretrained(path)
    return str(path)


def make_picollama(path: object, vocab_size: int = 64) -> str:
    return _saved(LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **_SIZES)), path)


def make_picogranite(path: object) -> str:
    return _saved(GraniteForCausalLM(GraniteConfig(vocab_size=64, **_SIZES)), path)


def make_gpt2size(path: object) -> str:
    """GPT-2 in its number of layers."""
    return _saved(GPT2LMHeadModel(GPT2Config(vocab_size=64, n_ctx=64, n_embd=48)), path)


def make_picoLlaVa(path: object) -> str:
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=64, **_SIZES),
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **_SIZES),
        image_token_index=63,
    )
    return _saved(LlavaForConditionalGeneration(config), path)


def run_and_check_merge(
    config: MergeConfiguration,
    validate: Callable[[str], None] | None = None,
    auto_arch: bool = False,  # no matter here: mergekit finds out itself what it merges
) -> None:
    """Every tensor of the result is finite, and ``validate`` has nothing against the folder."""
    with tempfile.TemporaryDirectory() as folder:
        run_merge(config, out_path=folder, options=MergeOptions(quiet=True))
        loader = LazyTensorLoader.from_disk(folder)
        assert loader.index.tensor_paths
        for name in loader.index.tensor_paths:
            tensor = loader.get_tensor(name)
            assert bool(torch.isfinite(tensor).all()), name
        if validate is not None:
            validate(folder)
