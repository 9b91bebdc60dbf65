"""FusionBench's two ways to blend, where it is installed (the extra ``bench``).

``state_dict_weighted_sum`` takes one weight per model. ``LayerWiseMergedModel.merge_weights`` adds
weighted task vectors, one weight per model and tensor, to a pretrained model: here expert 0, which
takes the weight that is left to one, so that it reads as many rows as a blend of N experts. Forming
the task vectors is not timed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import machine
from .harness import Provider, say
from .shapes import Experts

_MOST_HELD = 0.2  # of the memory: the wrapper keeps the experts a second time, as task vectors


@functools.cache
def _module(name: str) -> Any:
    """A module of FusionBench, or None; the reason is said once."""
    try:
        return importlib.import_module(f"fusion_bench.{name}")
    except ImportError as error:
        say(f"no FusionBench: {error}; pip install 'fusion-bench>=0.2.33' adds it")
        return None


def blend_providers(rows: list[list[float]], experts: Experts) -> list[Provider]:
    """Those that can blend ``experts`` with the weights ``rows``, (S or 1, N)."""
    states, row = experts.state_dicts, experts.params[0].nbytes
    arithmetic = _module("utils.state_dict_arithmetic")
    wrappers = _module("models.wrappers.layer_wise_fusion")
    found = []
    if arithmetic and len(rows) == 1:

        def weighted_sum() -> list[Tensor]:
            return list(arithmetic.state_dict_weighted_sum(states, rows[0]).values())

        found.append(Provider("FusionBench weighted sum", weighted_sum, needs=2 * row))
    name, held = "FusionBench merge_weights", (len(states) - 1) * row
    if held > _MOST_HELD * machine.memory(experts.params.device.type):
        say(f"{name} skipped for N={len(states)}: {held / 1e9:.1f} GB of task vectors")
    elif wrappers and held:
        merge = _merge_weights(wrappers.LayerWiseMergedModel, rows, states)
        found.append(Provider(name, merge, needs=3 * row, holds=held))
    return found


def _merge_weights(
    wrapper: Callable[..., Any], rows: list[list[float]], states: list[dict[str, Tensor]]
) -> Callable[[], list[Tensor]]:
    names = list(states[0])
    per_tensor = dict(zip(names, rows * len(names) if len(rows) == 1 else rows, strict=True))
    pretrained, *tuned = [_as_module(state) for state in states]
    order = [name for name, _ in pretrained.named_parameters()]
    table = torch.tensor([per_tensor[name] for name in order]).T[1:].contiguous()
    first = next(iter(states[0].values()))
    model = wrapper(table.to(first), pretrained.requires_grad_(), tuned)

    @torch.no_grad()
    def run() -> list[Tensor]:
        merged = model.merge_weights()
        return [merged[name].detach() for name in names]

    return run


def _as_module(state: dict[str, Tensor]) -> nn.Module:
    """A module with these parameters (their memory, not copies), and nothing else."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]
        at.register_parameter(last, nn.Parameter(tensor))
    return root
