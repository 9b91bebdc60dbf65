"""What a merge of aligned networks needs afterwards: statistics that fit its own activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks
from ..encoders.template import call, evaluating
from ..neulig.batchnorm import images_of, re_estimate
from .networks import detached
from .spec import Spec
from .taps import Layers, Part

if TYPE_CHECKING:
    from .._experts import Expert


def reestimate_batchnorm(
    state: Mapping[str, Tensor], template: nn.Module, data: Iterable[Any]
) -> dict[str, Tensor]:
    """The state dict with BatchNorm's running statistics measured on ``data`` (MuDSC, section 4).

    A merged network's activations are not those of its experts, whose averaged statistics would
    normalise them wrongly. One pass in which every batch is normalised by itself; batches count by
    their size. Networks without BatchNorm come back as they are.

    Args:
        state: of ``template``'s architecture. Not changed.
        data: batches of images, or (images, ...) tuples, as in training.

    Raises:
        ValueError: no batches.
    """
    changed = {name: tensor.clone() for name, tensor in state.items()}
    re_estimate(template, changed, map(images_of, data))
    return changed


def rescale(
    state: Mapping[str, Tensor],
    experts: Iterable[Expert],
    template: nn.Module,
    spec: Spec,
    data: Iterable[Any],
) -> dict[str, Tensor]:
    """The state dict with every layer's activations as large as the experts' (REPAIR).

    Averaged networks lose variance layer by layer. Rows and biases of every layer that produces
    units and has a bias are scaled and shifted so that each unit's mean and standard deviation, on
    ``data``, are the experts' averages, layer after layer with the repaired input (Jordan et al.,
    arXiv 2211.08403). As in BatchNorm's training, a batch is repaired by its own moments, and their
    averages are what is written: large batches are better. Layers without bias are BatchNorm's
    business: see :func:`reestimate_batchnorm`.

    Args:
        state: merged; not changed.
        experts: aligned, as ``Alignment.apply`` gives them.
        data: batches of images, or (images, ...) tuples; read once per network.

    Raises:
        ValueError: no batches; data that can be read only once; no layer with a bias.
    """
    if iter(data) is data:
        raise ValueError("rescale: data is read once per network, got an iterator: give a list")
    names = {use.tensor for use in spec.uses if use.role == "out" and state[use.tensor].ndim > 1}
    seen = [_run(template, detached(expert), names, data, None) for expert in experts]
    _checks.raise_all("rescale", [] if seen else ["needs at least one expert, got none"])
    targets = {name: _average([moments[name] for moments in seen]) for name in seen[0]}
    changed = {name: tensor.clone() for name, tensor in state.items()}
    own = _run(template, changed, names, data, targets)
    for name, moments in own.items():
        scale, shift = _affine(moments, targets[name])
        weight, bias = changed[name], changed[moments.bias]
        rows = (-1, *(1,) * (weight.ndim - 1))
        weight.copy_(weight.to(scale.dtype) * scale.view(rows))
        bias.copy_(bias.to(scale.dtype) * scale + shift)
    return changed


class _Moments(NamedTuple):
    """Mean and standard deviation of a layer's outputs: (O,) fp64; and its bias's name."""

    mean: Tensor
    deviation: Tensor
    bias: str


def _affine(own: _Moments, target: _Moments) -> tuple[Tensor, Tensor]:
    """Scale and shift that turn ``own`` moments into the target's; a constant unit keeps scale."""
    varies = own.deviation > 0
    scale = torch.where(varies, target.deviation / own.deviation.clamp_min(1e-300), 1.0)
    return scale, target.mean - scale * own.mean


def _average(moments: list[_Moments]) -> _Moments:
    mean = torch.stack([m.mean for m in moments]).mean(0)
    return _Moments(mean, torch.stack([m.deviation for m in moments]).mean(0), moments[0].bias)


@torch.no_grad()
def _run(
    template: nn.Module,
    tensors: Mapping[str, Tensor],
    names: Iterable[str],
    data: Iterable[Any],
    targets: Mapping[str, _Moments] | None,
) -> dict[str, _Moments]:
    floats = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    layers = _Outputs(tensors, set(names), targets)
    with evaluating(template), layers:
        batches = 0
        for batch in data:
            batches += 1
            images = images_of(batch)
            call(template, tensors, images.to(floats[0].device, floats[0].dtype))
    if not batches:
        raise ValueError("rescale: data must yield at least one batch of images, got none")
    if not layers.sums:
        raise ValueError(
            "rescale: no layer that makes units has a bias to shift; for networks with BatchNorm "
            "there is reestimate_batchnorm"
        )
    return {name: layers.moments(name) for name in layers.sums}


class _Outputs(Layers):
    """Sums up the batches' moments of every layer, and repairs its output if told the targets."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        names: set[str],
        targets: Mapping[str, _Moments] | None,
    ) -> None:
        super().__init__(tensors)
        self._names, self._targets = names, targets
        self.sums: dict[str, tuple[int, Tensor, Tensor, str]] = {}

    def moments(self, name: str) -> _Moments:
        count, mean, variance, bias = self.sums[name]
        return _Moments(mean / count, (variance / count).sqrt(), bias)

    def product(self, x: Tensor, part: Part, bias: Part | None, result: Tensor) -> Tensor:
        rows = self.tensors[part.name].shape[0]
        if part.name not in self._names or bias is None or result.shape[-1] != rows:
            return result
        flat = result.flatten(0, -2).double()
        variance, mean = torch.var_mean(flat, 0, correction=0)
        count, means, variances, _ = self.sums.get(part.name, (0, 0, 0, ""))
        n = len(flat)
        self.sums[part.name] = count + n, means + n * mean, variances + n * variance, bias.name
        if self._targets is None:
            return result
        own = _Moments(mean, variance.sqrt(), bias.name)
        scale, shift = _affine(own, self._targets[part.name])
        return torch.addcmul(shift.to(result.dtype), result, scale.to(result.dtype))
