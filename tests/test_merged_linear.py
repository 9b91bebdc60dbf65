"""MergedLinear: the loop over samples that it replaces, gradients, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import neulig_fast as nf
from neulig_fast import testing


def layers(count: int, bias: bool = True, dtype: torch.dtype = torch.float64) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(6, 4, bias=bias, dtype=dtype) for _ in range(count)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_it_is_a_merged_layer_for_every_sample(dtype: torch.dtype, bias: bool) -> None:
    base, *vectors = layers(4, bias, dtype)
    x, coef = torch.randn(5, 3, 6).to(dtype), torch.randn(5, 3)
    merged = nf.MergedLinear(base, vectors)

    def loop(kind: torch.dtype) -> torch.Tensor:
        results = []
        for sample, weights in zip(x.to(kind), coef.to(kind), strict=True):
            both = [(layer.weight.to(kind), layer.bias) for layer in (base, *vectors)]
            W = both[0][0] + sum(c * w for c, (w, _) in zip(weights, both[1:], strict=True))
            y = sample @ W.T
            if bias:
                y = y + both[0][1].to(kind)
                y = y + sum(c * b.to(kind) for c, (_, b) in zip(weights, both[1:], strict=True))
            results.append(y)
        return torch.stack(results)

    testing.assert_within_rule(merged(x, coef), loop(dtype), loop(torch.float64), terms=24)
    alike = merged(x, coef[0])
    expected = merged(x, coef[:1].expand(5, 3))
    assert torch.allclose(alike, expected, atol=8 * torch.finfo(dtype).eps)
    assert not list(merged.parameters()) and len(merged.state_dict()) == 1 + bias


def test_gradients() -> None:
    merged = nf.MergedLinear(*(lambda base, *rest: (base, rest))(*layers(3)))
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    coef = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(merged, (x, coef))


def test_everything_that_does_not_fit_is_named() -> None:
    base, other = layers(2)
    base, tau = layers(2)
    tau.bias = nn.Parameter(tau.bias.float())
    said = r"task vector 0 has a bias of torch.float32 on cpu, its weight torch.float64 on cpu"
    with pytest.raises(ValueError, match=said):
        nf.MergedLinear(base, [tau])
    tau.bias = nn.Parameter(base.bias.to("meta"))
    with pytest.raises(
        ValueError, match=r"bias of torch.float64 on meta, its weight torch.float64 on cpu"
    ):
        nf.MergedLinear(base, [tau])
    with pytest.raises(TypeError, match=r"must be nn.Linear layers, got Conv1d"):
        nf.MergedLinear(base, [other, nn.Conv1d(1, 1, 1)])
    with pytest.raises(ValueError, match="must be N >= 1 layers, got none"):
        nf.MergedLinear(base, [])
    wrong = nn.Linear(5, 4, bias=False, dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"(?s)vector 1 has weights.*vector 1 is torch.float32.*lacks"
    ):
        nf.MergedLinear(base, [other, wrong])
    merged = nf.MergedLinear(base, [other])
    with pytest.raises(ValueError, match=r"coef must be \(B, N\) or \(N,\) with N = 1, got"):
        merged(torch.zeros(2, 6, dtype=torch.float64), torch.zeros(2, 2))
    with pytest.raises(TypeError, match="coef"):
        merged(torch.zeros(2, 6, dtype=torch.float64), 1.0)
