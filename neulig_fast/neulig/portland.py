"""The Portland: one affine layer that reads all experts' features and weighs the experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import shape


class Portland(nn.Module):
    """a = W [z_1 … z_N] + c, CoopVec w = softmax(a). NeuLig (arXiv 2503.01268).

    ``weight`` (N, N·D) and ``bias`` (N,) start uniform in ±1/√(N·D), drawn from a generator of
    their own: the global one is neither read nor moved.

    Args:
        num_experts: N >= 1.
        feature_dim: D >= 1.
        seed: of the initial values.
        dtype: fp32 or fp64; the draw is the same up to rounding.
    """

    def __init__(
        self, num_experts: int, feature_dim: int, seed: int = 0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if num_experts < 1 or feature_dim < 1:
            raise ValueError(
                f"Portland: num_experts and feature_dim must be >= 1, "
                f"got {num_experts} and {feature_dim}"
            )
        generator = torch.Generator().manual_seed(seed)
        bound = (num_experts * feature_dim) ** -0.5

        def draw(*sizes: int) -> nn.Parameter:
            uniform = torch.rand(*sizes, generator=generator, dtype=torch.float64)
            return nn.Parameter(((2 * uniform - 1) * bound).to(dtype))

        self.num_experts, self.feature_dim = num_experts, feature_dim
        self.weight = draw(num_experts, num_experts * feature_dim)
        self.bias = draw(num_experts)

    def coopvec(self, features: Tensor) -> Tensor:
        """CoopVecs (B, N) of features (B, N, D); rows are non-negative and sum to one.

        Without autocast: they are coefficients of parameters.

        Raises:
            ValueError: features of another shape.
        """
        if features.ndim != 3 or features.shape[1:] != (self.num_experts, self.feature_dim):
            raise ValueError(
                f"Portland: features must be (B, {self.num_experts}, {self.feature_dim}), "
                f"got {shape(features)}"
            )
        inputs = features.flatten(1).to(self.weight.dtype)
        with torch.autocast(inputs.device.type, enabled=False):
            return torch.softmax(nn.functional.linear(inputs, self.weight, self.bias), dim=1)

    forward = coopvec


def ensemble_features(coopvec: Tensor, features: Tensor) -> Tensor:
    """e_b = Σ_i w_bi z_bi: (B, N) and (B, N, D) -> (B, D), in the CoopVecs' dtype."""
    return (coopvec.unsqueeze(1) @ features.to(coopvec.dtype)).squeeze(1)
