"""Weight-ensembling mixtures of experts: a merged MLP of its own for every sample.

    y_b = f(x_b; base + sum_i w_bi tau_i)                WE-MoE, arXiv 2402.00433

The originals merge the whole MLP for one sample, run it, and go on to the next. Here the MLP runs
once for the batch, and its linear layers are ``mixture_linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ...merged_linear import MergedLinear
from ...ops.blend_lists import blend_lists
from .._seam import Seam, Unsupported
from .._tensors import check_plain
from ._merged_models import updated, with_task_vectors, without_gradient

_CLASSES = (
    "fusion_bench.models.we_moe:WeightEnsemblingMoE",
    "fusion_bench.models.sparse_we_moe:SparseWeightEnsemblingMoE",
    "fusion_bench.models.sparse_we_moe:SparseWeightEnsemblingMoE_ShardGate",
)
# What may be between linear layers: every element, or row, by itself.
_POINTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Identity)
_LAST = {"Depth_1_Gate": "fc", "Depth_2_Gate": "fc2"}  # layers of gates, by their type
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONTAINERS = (
    "torch.nn.modules.container.Sequential",
    "transformers.models.clip.modeling_clip.CLIPMLP",
    "transformers.models.t5.modeling_t5.T5DenseActDense",
    "transformers.models.t5.modeling_t5.T5DenseGatedActDense",
)


def seams() -> list[Seam]:
    """Of the three classes: merging for one sample or for all, and the forward pass."""
    found = []
    for where in _CLASSES:
        exact, accurate = _merging(without_gradient), _merging(blend_lists)
        found.append(Seam(f"{where}.merge_weights", exact, accurate))
        found.append(Seam(f"{where}.forward", None, forward))
    return found


def _merging(merge: Callable[..., Any]) -> Callable[..., Any]:
    def merge_weights(self: Any, expert_weights: Any) -> dict[str, Tensor]:
        check_plain(expert_weights, grad=True)
        state, names, lists = with_task_vectors(self.base_model, self.task_vectors)
        if expert_weights.shape != (lists.num_experts - 1,):
            raise Unsupported("weights of another shape than (experts,)")
        weights = torch.cat([expert_weights.new_ones(1), expert_weights])
        self._merged_state_dict = updated(state, names, merge(weights, lists))
        return self._merged_state_dict

    return merge_weights


def forward(self: Any, hidden_states: Tensor) -> Tensor:
    """The module's forward pass, all samples in one."""
    if self.gate.num_hidden_layers == 0 or self.batch_reduce:
        raise Unsupported("one merge for all samples, which merge_weights makes")
    check_plain(hidden_states, grad=True)
    if hidden_states.ndim != 3 or 0 in hidden_states.shape:
        raise Unsupported("hidden states that are not (B, T, D), or empty")
    if torch.is_autocast_enabled(hidden_states.device.type):
        raise Unsupported("autocast")
    check_gate(self.gate, len(self.task_vectors))
    mixture = _Mixture(self.base_model, self.task_vectors, hidden_states)
    weights = self.gate(_gate_input(self, hidden_states))
    mixture.coef = weights.mean(dim=1 if self.batch_first else 0)
    rows = hidden_states if self.batch_first else hidden_states.transpose(0, 1)
    with mixture:
        result = self.base_model(rows)
    self._merged_state_dict = None
    return result if self.batch_first else result.transpose(0, 1)


def check_gate(gate: nn.Module, experts: int) -> None:
    """Unsupported unless it makes one weight per expert, which is known before it runs."""
    last = getattr(gate, _LAST.get(type(gate).__name__, ""), None)
    if not isinstance(last, nn.Linear) or last.out_features != experts:
        raise Unsupported("a gate of another kind, or not of one weight per expert")


def _gate_input(model: Any, hidden_states: Tensor) -> Tensor:
    """A shared gate is also told which layer asks."""
    if not getattr(model, "position_encoding", False):
        return hidden_states
    place = model.layer_positional_encoding.to(hidden_states.device)
    place = place.expand(*hidden_states.shape[:2], model.position_encoding_dim)
    return torch.cat((place, hidden_states), dim=-1)


class _Mixture(TorchFunctionMode):
    """While it is active, the base's linear layers are those of a merged model per sample."""

    coef: Tensor  # (B, N)

    def __init__(self, base: nn.Module, task_vectors: Sequence[nn.Module], x: Tensor) -> None:
        super().__init__()
        check_structure(base)
        names = [name for name, layer in base.named_modules() if isinstance(layer, nn.Linear)]
        try:
            layers = [[m.get_submodule(name) for m in (base, *task_vectors)] for name in names]
        except AttributeError:
            raise Unsupported("task vectors of another structure than the base") from None
        tensors = [t for alike in layers for layer in alike for t in layer.parameters()]
        check_plain(*tensors)
        if not tensors or {(t.dtype, t.device) for t in tensors} != {(x.dtype, x.device)}:
            raise Unsupported("tensors of several dtypes, or on several devices")
        try:
            self._layers = {id(own.weight): MergedLinear(own, rest) for own, *rest in layers}
        except (TypeError, ValueError):
            raise Unsupported("task vectors of another structure than the base") from None
        if len(self._layers) < len(layers):
            raise Unsupported("tied parameters")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear and (layer := self._layers.get(id(args[1]))) is not None:
            return layer(args[0], self.coef)
        return func(*args, **(kwargs or {}))


def check_structure(base: nn.Module) -> None:
    """Unsupported unless the base is linear layers and functions of single elements or rows."""
    for module in base.modules():
        kind = type(module)
        if any(getattr(module, hooks) for hooks in _HOOKS):
            raise Unsupported("hooks")
        if isinstance(module, nn.Dropout):
            if module.training and module.p > 0:
                raise Unsupported("dropout")
        elif f"{kind.__module__}.{kind.__qualname__}" not in _CONTAINERS and not (
            kind in (nn.Linear, *_POINTWISE) or kind.__module__ == "transformers.activations"
        ):
            raise Unsupported(f"a base model with {kind.__name__} in it")
