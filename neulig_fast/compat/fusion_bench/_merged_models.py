"""AdaMerging's models, LayerWiseMergedModel and TaskWiseMergedModel, and Pareto merging's modules.

    theta[p] = base[p] + sum_i w[i, p] tau_i[p]          arXiv 2310.02575, 2406.09770

The originals make a new tensor for every addition, and keep N of them per parameter for autograd;
here it is one blend of the base, with weight 1, and the task vectors, with one pass back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.blend_lists import blend_lists
from ...tensor_lists import TensorLists
from .._seam import Seam, Unsupported
from .._tensors import check_plain
from ._tensors import as_lists, check_wide

Merge = Callable[[Tensor, TensorLists], Sequence[Tensor]]


def seams() -> list[Seam]:
    """Of the two models, and of the module whose weights a preference decides."""
    wrappers = "fusion_bench.models.wrappers"
    pareto = "fusion_bench.method.pwe_moe.module:ParetoWeightEnsemblingModule"
    return [
        Seam(
            f"{wrappers}.layer_wise_fusion:LayerWiseMergedModel.merge_weights",
            _layer_wise(_as_the_original),
            _layer_wise(blend_lists),
        ),
        Seam(
            f"{wrappers}.task_wise_fusion:TaskWiseMergedModel.merge_weights",
            _task_wise(without_gradient),
            _task_wise(blend_lists),
        ),
        Seam(f"{pareto}._merge_state_dict", None, _by_preference),
    ]


def _layer_wise(merge: Merge) -> Callable[..., Any]:
    def merge_weights(self: Any, task_vector_mask: Any = None) -> dict[str, Tensor]:
        _check(self, task_vector_mask)
        weights = self.merge_weight.clamp(0, 1) if self.clamp_weights else self.merge_weight
        if self.nromalized_merging_weights:  # its name in FusionBench
            weights = weights.softmax(dim=0)
        state, names, lists = with_task_vectors(self.pretrained_model, self.task_vectors)
        if weights.shape != (lists.num_experts - 1, lists.num_tensors):
            raise Unsupported("weights of another shape than the task vectors'")
        merged = merge(torch.cat([weights.new_ones(1, len(names)), weights]).T, lists)
        self._merged_state_dict = updated(state, names, merged)
        return self._merged_state_dict

    return merge_weights


def _task_wise(merge: Merge) -> Callable[..., Any]:
    def merge_weights(self: Any, task_vector_mask: Any = None) -> dict[str, Tensor]:
        _check(self, task_vector_mask)
        weights = self.merge_weight.clamp(0, 1) if self.clamp_weights else self.merge_weight
        state, names, lists = with_task_vectors(self.pretrained_model, self.task_vectors)
        if weights.shape != (lists.num_experts - 1,):
            raise Unsupported("weights of another shape than the task vectors'")
        merged = merge(torch.cat([weights.new_ones(1), weights]), lists)
        self._merged_state_dict = updated(state, names, merged)
        return self._merged_state_dict

    return merge_weights


def _by_preference(self: Any) -> dict[str, Tensor]:
    """The original adds up task vectors before the base, which rounds otherwise."""
    if self.preference_vector is None:
        raise Unsupported("no preference vector")
    state = self.base_model.state_dict(keep_vars=True)
    experts = [*zip(*(stack.unbind() for stack in self.expert_params), strict=True)]
    lists = as_lists([[*state.values()], *experts])
    weights = self.gate(self.preference_vector)
    check_plain(weights, grad=True)
    if weights.shape != (len(experts),):
        raise Unsupported("weights of another shape than (experts,)")
    merged = blend_lists(torch.cat([weights.new_ones(1), weights]), lists)
    return dict(zip(state, merged, strict=True))


def _check(model: Any, mask: Any) -> None:
    if mask is not None:
        raise Unsupported("a task_vector_mask")
    check_plain(model.merge_weight, grad=True)


def with_task_vectors(
    base: nn.Module, task_vectors: Sequence[nn.Module]
) -> tuple[dict[str, Tensor], list[str], TensorLists]:
    """The base's state, the names that task vectors have, and the base's and their tensors."""
    state = base.state_dict(keep_vars=True)
    vectors = [dict(module.named_parameters()) for module in task_vectors]
    names = list(vectors[0]) if vectors else []
    if not names or any(list(vector) != names for vector in vectors):
        raise Unsupported("no task vectors, or of several lists of names")
    if not state.keys() >= set(names):
        raise Unsupported("task vectors of parameters that the base lacks")
    return state, names, as_lists([[state[k] for k in names], *(list(v.values()) for v in vectors)])


def updated(
    state: dict[str, Tensor], names: Sequence[str], merged: Sequence[Tensor]
) -> dict[str, Tensor]:
    state.update(zip(names, merged, strict=True))
    return state


# -- to the bit -----------------------------------------------------------------------------------


def _as_the_original(weights: Tensor, lists: TensorLists) -> Sequence[Tensor]:
    check_wide(lists.flat)
    if weights.requires_grad and torch.is_grad_enabled():
        return _SummedTensorByTensor.apply(weights, lists)
    return blend_lists(weights, lists)


def without_gradient(weights: Tensor, lists: TensorLists) -> Sequence[Tensor]:
    check_wide(lists.flat)
    if weights.requires_grad and torch.is_grad_enabled():
        raise Unsupported("a gradient, which the original adds up in its graph's order")
    return blend_lists(weights, lists)


class _SummedTensorByTensor(torch.autograd.Function):
    """The blend, and back every product with a task vector summed as the original sums it."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, lists: TensorLists) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*(x for xs in lists.lists[1:] for x in xs))
        ctx.weights = weights.new_zeros(weights.shape)
        return tuple(blend_lists(weights, lists))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        result = torch.zeros_like(ctx.weights)  # (T, 1 + N), the base's column first
        for k, vector in enumerate(ctx.saved_tensors):
            i, t = divmod(k, len(grads))
            if (grad := grads[t]) is not None:
                result[t, i + 1] = (grad * vector).sum()
        return result, None
