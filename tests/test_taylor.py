"""The theory on a real encoder: how merged and ensembled features part as experts move apart.

Experts theta_i = mean + t * xi_i with sum xi_i = 0 (docs/neulig.md, 2). The gap of the own blend is
O(t^2), and O(t^3) once its second-order term is subtracted; the gap of another blend is O(t), and
O(t^2) once its first-order term is subtracted.
"""

import math

import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from neulig_fast.neulig.merged import per_sample_features
from neulig_fast.pool import ExpertPool

STEPS = (0.01, 0.005)
N, B = 3, 2


def vit():
    return VisionTransformer(
        image_size=16, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2, output_dim=8
    ).double()


class Family:
    """Experts at distance t from a mean encoder, and the derivatives of that encoder."""

    def __init__(self):
        self.module = vit().eval()
        self.mean = {k: v.detach() for k, v in self.module.named_parameters()}
        draws = [
            {k: v.abs().mean() * torch.randn_like(v) for k, v in self.mean.items()}
            for _ in range(N)
        ]
        centre = {k: sum(draw[k] for draw in draws) / N for k in self.mean}
        self.offsets = [{k: draw[k] - centre[k] for k in self.mean} for draw in draws]
        self.images = torch.randn(B, 3, 16, 16, dtype=torch.float64)
        self.w = torch.softmax(torch.randn(B, N, dtype=torch.float64), 1)

    def pool(self, t):
        states = [{k: self.mean[k] + t * xi[k] for k in self.mean} for xi in self.offsets]
        return ExpertPool(states, self.module)

    def merged(self, t, weights):
        return per_sample_features(self.pool(t), self.images, weights)

    def ensemble(self, t):
        experts = torch.eye(N, dtype=torch.float64)
        features = [self.merged(t, one_hot.expand(B, N)) for one_hot in experts]
        return sum(self.w[:, i, None] * z for i, z in enumerate(features))

    def direction(self, b, weights):
        """sum_i weights_i xi_i."""
        return {k: sum(weights[i] * self.offsets[i][k] for i in range(N)) for k in self.mean}

    def features(self, b):
        return lambda params: functional_call(self.module, params, (self.images[b : b + 1],))[0]

    def first_order(self, weights):
        """J sum_i weights_bi xi_i for every image, (B, D)."""
        return torch.stack(
            [
                jvp(self.features(b), (self.mean,), (self.direction(b, weights[b]),))[1]
                for b in range(B)
            ]
        )

    def curvature(self, b, v):
        """H_f[v, v] at the mean, (D,): central difference of J v along v.

        jvp of jvp through this encoder disagrees with differences of values, torch 2.11.
        """
        h = 1e-4
        ends = ({k: p + step * v[k] for k, p in self.mean.items()} for step in (h, -h))
        after, before = (jvp(self.features(b), (end,), (v,))[1] for end in ends)
        return (after - before) / (2 * h)

    def second_order(self):
        """-1/2 sum_i w_i H_f[xi_i - m, xi_i - m] with m = sum_i w_i xi_i, (B, D)."""
        terms = []
        for b, w in enumerate(self.w):
            spread = [self.direction(b, row - w) for row in torch.eye(N, dtype=torch.float64)]
            terms.append(-sum(w[i] * self.curvature(b, v) for i, v in enumerate(spread)) / 2)
        return torch.stack(terms)


def slope(gap):
    """Of log gap(t) over log t."""
    coarse, fine = (float(gap(t).norm()) for t in STEPS)
    return math.log(coarse / fine) / math.log(STEPS[0] / STEPS[1])


@pytest.fixture(scope="module")
def family():
    torch.manual_seed(4)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # no forward-mode derivative
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        yield Family()
    torch.backends.mha.set_fastpath_enabled(fast)


def own_gap(family):
    return lambda t: family.merged(t, family.w) - family.ensemble(t)


def other_gap(family):
    """Every image merged with another image's weights."""
    return lambda t: family.merged(t, family.w.flip(0)) - family.ensemble(t)


def test_own_blend_is_second_order(family):
    assert slope(own_gap(family)) == pytest.approx(2, abs=0.1)


def test_own_blend_less_its_second_order_term_is_third_order(family):
    gap, term = own_gap(family), family.second_order()
    assert slope(lambda t: gap(t) - t**2 * term) == pytest.approx(3, abs=0.1)


def test_another_blend_is_first_order(family):
    assert slope(other_gap(family)) == pytest.approx(1, abs=0.1)


def test_another_blend_less_its_first_order_term_is_second_order(family):
    gap, term = other_gap(family), family.first_order(family.w.flip(0) - family.w)
    assert slope(lambda t: gap(t) - t * term) == pytest.approx(2, abs=0.1)
