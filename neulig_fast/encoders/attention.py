"""Attention, and ``torch.nn.MultiheadAttention``."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from .rules import register
from .runs import Run


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(R, T, heads * d) -> (R, heads, T, d)."""
    return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(R, heads, T, d) -> (R, T, heads * d)."""
    return x.transpose(1, 2).flatten(2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) v, head by head, for all rows at once: (R, heads, T, d) each."""
    return F.scaled_dot_product_attention(query, key, value)


def multihead(run: Run, module: Any, path: str, query: Tensor, memory: Tensor) -> Tensor:
    """``MultiheadAttention`` of query (R, Tq, D) over memory (R, T, K), tokens in dimension 1."""
    stack, bias = run.stacks(module, path, "in_proj_weight", "in_proj_bias")
    if stack is not None and query is memory:
        projected = run.linear(query, stack, bias).chunk(3, -1)
    else:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        weights = run.stacks(module, path, *names) if stack is None else stack.chunk(3, 1)
        biases = [None] * 3 if bias is None else bias.chunk(3, 1)
        inputs = (query, memory, memory)
        projected = [run.linear(*layer) for layer in zip(inputs, weights, biases, strict=True)]
    attended = attend(*(split_heads(part, module.num_heads) for part in projected))
    return run.child(module, path, "out_proj", merge_heads(attended))


def _why_not(module: Any) -> str | None:
    if module.bias_k is not None or module.bias_v is not None:
        return "add_bias_kv=True"
    return "add_zero_attn=True" if module.add_zero_attn else None


@register("torch.nn.modules.activation.MultiheadAttention", why_not=_why_not)
def self_attention(run: Run, module: Any, path: str, x: Tensor) -> Tensor:
    """Self-attention, x being (rows, tokens, D) whatever ``batch_first`` says."""
    return multihead(run, module, path, x, x)
