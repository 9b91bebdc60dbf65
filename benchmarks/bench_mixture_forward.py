"""mixture_forward: a batch through merged models, one per image, against making those models.

``blend per image`` makes every merged model with this project's operator, the Python sum with the
published loop over the state dict; vmap makes a few at a time and runs them side by side.
Concatenated K is exact without any merged model: inputs and weights of all experts are laid side by
side, for N times the operations of one forward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neulig_fast import blend, mixture_forward
from neulig_fast.encoders import MixtureRun
from neulig_fast.encoders.runs import stack_of
from neulig_fast.encoders.torch_func import mixture_features
from neulig_fast.ops._activation import ACTIVATIONS

from . import encoders
from .encoders import Inputs
from .harness import Case


class Concatenated(MixtureRun):
    """sum_i w_i W_i x as one product: [W_1 ... W_N] [w_1 x; ...; w_N x]."""

    def linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        wide = weight.transpose(0, 1).flatten(1)  # (O, N * I)
        y = self._side_by_side(x, -1) @ wide.T
        if bias is not None:
            y = y + self.per_row(bias).view(len(y), *[1] * (y.ndim - 2), -1)
        return ACTIVATIONS[activation].function(y)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, g: Any) -> Tensor:
        y = F.conv2d(self._side_by_side(x, 1), weight.transpose(0, 1).flatten(1, 2), None, *g)
        return y if bias is None else y + self.per_row(bias)[..., None, None]

    def _side_by_side(self, x: Tensor, dim: int) -> Tensor:
        """w_1 x, ..., w_N x one after the other along ``dim``."""
        w = self._coef.T.to(x.dtype)
        return torch.cat([*(x * w.view(*w.shape, *[1] * (x.ndim - 1)))], dim)


def providers(given: Inputs) -> dict[str, Any]:
    pool, images, coef = given.pool, given.images, given.coef
    states = given.states()

    def one_by_one(merge: Any) -> Tensor:
        pairs = zip(images.split(1), coef, strict=True)
        return torch.cat([given.run(merge(w), image) for image, w in pairs])

    def summed(w: Tensor) -> encoders.State:
        w = w.to(pool.params.dtype)
        return {
            name: sum(w[i] * state[name] for i, state in enumerate(states))
            if tensor.is_floating_point()
            else tensor
            for name, tensor in states[0].items()
        }

    concatenated = Concatenated(functools.partial(stack_of, pool), coef, "blend")
    return {
        "neulig_fast": lambda: mixture_forward(pool, images, coef),
        **encoders.replayed(given, mixture_forward, images, coef),
        "blend per image": lambda: one_by_one(lambda w: pool.row_state_dict(blend(w, pool.params))),
        "Python sum per image, as published": lambda: one_by_one(summed),
        "torch.func.vmap over merged models": lambda: mixture_features(
            pool, given.template, images, coef
        ),
        "concatenated K": lambda: concatenated.apply(given.template, "", images),
    }


def cases(device: str, quick: bool, **sizes: Any) -> Iterator[Case]:
    for setting in encoders.settings(device, quick, **sizes):
        given = encoders.inputs(setting, device)
        if given is None:
            continue

        def expected(dtype: torch.dtype, count: int, given: Inputs = given) -> Tensor:
            pool, images = given.pool, given.images[:count].to(dtype)
            results = []
            for image, w in zip(images.split(1), given.coef.double(), strict=False):
                row = sum(w[i] * params.double() for i, params in enumerate(pool.params))
                results.append(given.run(pool.row_state_dict(row.to(dtype)), image))
            return torch.cat(results)

        yield encoders.case("mixture_forward", setting, given, providers(given), expected, 1)


if __name__ == "__main__":
    encoders.main("mixture_forward", cases)
