"""RankOne-MoE: an MLP of its own for every sample, whose layers differ from the base's by low rank.

    W_b = W + U^T diag(w_b) V,    b_b = b + lambda sum_i b_i        all experts' ranks in one, (R)

The original makes W_b for one sample, runs it, and goes on to the next. Here the base runs once for
the batch, and x_b V^T, times w_b, times U is added to what its layers make of x_b.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .._seam import Seam, Unsupported
from .._tensors import check_plain
from ._experts import check_gate, check_structure

_LAYERS = ("fc1", "fc2")


def seams() -> list[Seam]:
    """Of the one class."""
    return [Seam("fusion_bench.models.rankone_moe:RankOneMoE.forward", None, forward)]


def forward(self: Any, hidden_states: Tensor) -> Tensor:
    """The module's forward pass, all samples in one."""
    if self.gate.num_hidden_layers == 0 or self.batch_reduce:
        raise Unsupported("one merge for all samples")
    check_plain(hidden_states, grad=True)
    if hidden_states.ndim != 3 or 0 in hidden_states.shape:
        raise Unsupported("hidden states that are not (B, T, D), or empty")
    if torch.is_autocast_enabled(hidden_states.device.type):
        raise Unsupported("autocast")
    mixture = _Mixture(self, hidden_states)
    check_gate(self.gate, mixture.ranks)
    weights = self.gate(hidden_states).mean(dim=1 if self.batch_first else 0)
    if self.select_k > 0:
        weights = torch.stack([self.top_k_soft(own, self.select_k) for own in weights])
    mixture.weights = weights[:, None]
    rows = hidden_states if self.batch_first else hidden_states.transpose(0, 1)
    with mixture:
        result: Tensor = self.base_model(rows)
    self._merged_state_dict = None
    return result if self.batch_first else result.transpose(0, 1)


class _Mixture(TorchFunctionMode):
    """While it is active, the base's layers are those of a merged model per sample."""

    weights: Tensor  # (B, 1, R)

    def __init__(self, model: Any, x: Tensor) -> None:
        super().__init__()
        base = model.base_model
        check_structure(base)
        found = {name: m for name, m in base.named_modules() if isinstance(m, nn.Linear)}
        if {*found} != {*_LAYERS} or found["fc1"].weight is found["fc2"].weight:
            raise Unsupported("a base model whose layers are not fc1 and fc2")
        self._layers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for name, layer in found.items():
            u, v = ([*getattr(model, f"task_vectors_{name}_{part}")] for part in ("u", "svh"))
            biases = getattr(model, f"task_vectors_{name}_bias")
            tensors = [layer.weight, layer.bias, biases, *u, *v]
            check_plain(*tensors, strided=True)
            if {(t.dtype, t.device) for t in tensors} != {(x.dtype, x.device)}:
                raise Unsupported("tensors of several dtypes, or on several devices")
            self._add(layer, u, v, model.init_lambda * biases.sum(0), model.num_experts)
        ranks = {len(u) for _, u, _ in self._layers.values()}
        if len(ranks) > 1:
            raise Unsupported("experts of several ranks")
        (self.ranks,) = ranks
        if x.dtype.itemsize < 4:
            raise Unsupported("16-bit tensors, whose products of low rank are rounded twice")

    def _add(
        self, layer: nn.Linear, u: list[Tensor], v: list[Tensor], bias: Tensor, experts: int
    ) -> None:
        if {len(u), len(v)} != {experts} or len({len(part) for part in (*u, *v)}) > 1:
            raise Unsupported("experts of several ranks")
        self._layers[id(layer.weight)] = layer.bias + bias, torch.cat(u), torch.cat(v)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not F.linear or (layer := self._layers.get(id(args[1]))) is None:
            return func(*args, **(kwargs or {}))
        bias, u, v = layer
        return F.linear(args[0], args[1], bias) + (args[0] @ v.T * self.weights) @ u
