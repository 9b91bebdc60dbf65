"""Recipes of any content: they are read, or refused in words; nothing else happens."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neulig_fast.checkpoints import recipe_file
from neulig_fast.checkpoints.recipe import Recipe
from neulig_fast.methods import METHODS

WORDS = st.sampled_from(
    [
        *(recipe_file.PARAMETERS + recipe_file.DTYPES + tuple(METHODS)),
        *("base", "m0", "m0+lora", "*", "self_attn", "union", "", "\0", "../m0"),
    ]
)
KEYS = st.sampled_from(
    [
        *("merge_method", "models", "slices", "modules", "sources", "model", "layer_range"),
        *("base_model", "parameters", "dtype", "out_dtype", "tokenizer", "tokenizer_source"),
        *("source", "tokens", "filter", "value", "neulig_fast", "parity", "residual_weight"),
        *recipe_file.PARAMETERS,
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=5)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(KEYS | st.integers() | st.none() | st.text(max_size=3), inner, max_size=5)
    ),
    max_leaves=25,
)
MODELS = st.lists(
    st.fixed_dictionaries({"model": WORDS}, optional={"parameters": ANYTHING}), max_size=3
)
NEARLY = st.fixed_dictionaries(
    {"merge_method": st.sampled_from(list(METHODS)), "models": MODELS},
    optional=dict.fromkeys(("parameters", "neulig_fast", "tokenizer", "base_model"), ANYTHING),
)


def read(content: Any) -> None:
    try:
        assert isinstance(recipe_file.parse(content, METHODS), Recipe)
    except ValueError as error:
        assert str(error).startswith("recipe: ")


@settings(max_examples=300, deadline=None)
@given(ANYTHING | NEARLY)
@example({"merge_method": ["linear"], "models": {"model": {}}})
@example({"merge_method": "linear", "models": [{"model": "a", "parameters": [{"weight": {}}]}]})
@example({("a",): 1})
@example({"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 10**400}}]})
@example({"merge_method": "ema", "models": [{"model": "a"}], "parameters": {"decay": [0, 10**400]}})
@example({"merge_method": "linear", "slices": [{"sources": [{"layer_range": [1e400, True]}]}]})
def test_any_content_is_read_or_refused(content: Any) -> None:
    read(content)


@settings(max_examples=100, deadline=None)
@given(NEARLY)
def test_what_yaml_makes_of_it_is_read_or_refused(content: dict[str, Any]) -> None:
    read(yaml.safe_load(yaml.safe_dump(content)))
