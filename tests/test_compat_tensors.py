"""The one door of the drop-ins: what of a call's tensors is taken, and why not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from neulig_fast.compat._seam import Unsupported
from neulig_fast.compat._tensors import check_alike, check_finite, check_plain

X = torch.arange(6.0).view(2, 3)
UNFIT: dict[str, Callable[[], list[object]]] = {
    "something else than tensors": lambda: [X, 1.0],
    "sparse tensors": lambda: [X.to_sparse()],
    "tensors without memory, or on an unknown device": lambda: [X.to("meta")],
    "tensors that are no fp32, bf16, fp16 or fp64": lambda: [X.int()],
    "negated views": lambda: [torch.ones(2, dtype=torch.cfloat).conj().imag],
    "tensors whose address is no multiple of their elements' size": lambda: [
        torch.frombuffer(bytearray(17), dtype=torch.float32, count=4, offset=1)
    ],
    "a gradient": lambda: [X.clone().requires_grad_()],
    "tensors of several shapes": lambda: [X, X[:1]],
    "tensors of several dtypes": lambda: [X, X.double()],
    "no tensors": list,
    "no elements": lambda: [X[:0]],
}


@pytest.mark.parametrize("reason", UNFIT)
def test_what_is_not_taken_has_its_reason(reason: str) -> None:
    with pytest.raises(Unsupported) as why:
        check_alike(UNFIT[reason](), strided=True)
    assert str(why.value) == reason


def test_strides_and_gradients_are_taken_where_that_is_said() -> None:
    with pytest.raises(Unsupported, match="strided tensors"):
        check_plain(X.t())
    check_plain(X.t(), strided=True)
    check_plain(X.clone().requires_grad_(), grad=True)
    with torch.no_grad():
        check_plain(X.clone().requires_grad_())


def test_a_tangent_is_not_lost() -> None:
    with forward_ad.dual_level(), pytest.raises(Unsupported, match="a forward-mode derivative"):
        check_plain(forward_ad.make_dual(X, torch.ones_like(X)), grad=True)


def test_torch_func_goes_to_the_original() -> None:
    def taken(x: Tensor) -> Tensor:
        check_plain(x)
        return x

    with pytest.raises(Unsupported, match=r"torch\.func"):
        torch.func.vmap(taken)(X)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    check_finite(X, X[:0], torch.full((3,), 6e4, dtype=torch.float16))
    with pytest.raises(Unsupported, match="not finite"):
        check_finite(X, torch.tensor([0.0, bad, 1.0]))
    with pytest.raises(Unsupported, match="not finite"):
        check_finite(torch.tensor([-10.0, 1.0]), below=10.0)
