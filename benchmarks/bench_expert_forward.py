"""expert_forward: a batch through N experts, against running them one after the other.

The others run on the same memory: the loop calls the template with views of each expert's row, vmap
with stacks of all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from neulig_fast import expert_forward
from neulig_fast.encoders.runs import stack_of
from neulig_fast.encoders.torch_func import batchable_attention

from . import encoders, harness
from .encoders import Inputs, State
from .harness import Case


def stacked(given: Inputs) -> tuple[State, State]:
    """What differs by expert, (N, ...) each, and what all share: the counters."""
    states = given.states()
    floats = [name for name, tensor in states[0].items() if tensor.is_floating_point()]
    stacks = {name: stack_of(given.pool, name) for name in floats}
    return stacks, {name: t for name, t in states[0].items() if name not in stacks}


def providers(given: Inputs) -> dict[str, Any]:
    states, (stacks, shared) = given.states(), stacked(given)
    compiled = harness.compiled(given.run)

    def at_once() -> Tensor:
        with batchable_attention():
            return vmap(lambda own: given.run({**own, **shared}, given.images))(stacks)

    return {
        "neulig_fast": lambda: expert_forward(given.pool, given.images),
        **encoders.replayed(given, expert_forward, given.images),
        "loop": lambda: torch.stack([given.run(state, given.images) for state in states]),
        "loop, torch.compile": lambda: torch.stack([compiled(s, given.images) for s in states]),
        "torch.func.vmap over stacked parameters": at_once,
    }


def cases(device: str, quick: bool, **sizes: Any) -> Iterator[Case]:
    for setting in encoders.settings(device, quick, **sizes):
        given = encoders.inputs(setting, device)
        if given is None:
            continue

        def expected(dtype: torch.dtype, count: int, given: Inputs = given) -> Tensor:
            images = given.images[:count].to(dtype)
            states = ({k: encoders.cast(t, dtype) for k, t in s.items()} for s in given.states())
            return torch.stack([given.run(state, images) for state in states])

        yield encoders.case(
            "expert_forward", setting, given, providers(given), expected, setting.experts
        )


if __name__ == "__main__":
    encoders.main("expert_forward", cases)
