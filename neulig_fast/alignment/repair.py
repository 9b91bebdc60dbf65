"""What a merge of aligned networks needs afterwards: statistics that fit its own activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _checks, _experts
from ..encoders.merged_rows import batchnorms
from ..encoders.template import call, evaluating
from ..neulig.batchnorm import re_estimate
from .batches import exactly, images_in
from .networks import check_devices, detached
from .spec import Spec, check_tensors
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
        TypeError: data that yields something else.
        ValueError: no batches; statistics that come out NaN or infinite; tensors on several
            devices.
    """
    check_devices("reestimate_batchnorm", {"state": state})
    changed = {name: tensor.clone() for name, tensor in state.items()}
    with exactly(_device(changed)):
        re_estimate(template, changed, images_in(data, changed, "reestimate_batchnorm"))
    measured = [f"{path}.running_{of}" for path in batchnorms(template) for of in ("mean", "var")]
    broken = [name for name in measured if not changed[name].isfinite().all()]
    faults = (f"{name} is NaN or infinite on these images" for name in broken)
    _checks.raise_all("reestimate_batchnorm", faults)
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
    business: see :func:`reestimate_batchnorm`. One scale cannot serve two layers: a weight or bias
    that is used twice is refused.

    Args:
        state: merged; not changed.
        experts: aligned, as ``Alignment.apply`` gives them.
        data: batches of images, or (images, ...) tuples; read once per network.

    Raises:
        TypeError: data that yields something else.
        ValueError: no batches; data that can be read only once; no layer with a bias; a spec that
            does not fit; outputs of layers that are NaN or infinite; tied weights or biases, and
            layers that run more than once; networks on several devices.
    """
    if isinstance(data, Iterator):
        raise ValueError("rescale: data is read once per network, got an iterator: give a list")
    check_tensors(spec, state, "rescale")
    experts = list(experts)
    _checks.raise_all("rescale", [] if experts else ["needs at least one expert, got none"])
    named = {f"experts[{i}]": expert for i, expert in enumerate(experts)}
    check_devices("rescale", {"state": state, **named})
    axes = {
        use.tensor: use.axis
        for use in spec.uses
        if use.role == "out" and state[use.tensor].ndim > 1
    }
    seen = [_run(template, detached(expert), axes, data, None) for expert in experts]
    targets = {name: _average([moments[name] for moments in seen]) for name in seen[0]}
    changed = {name: tensor.clone() for name, tensor in state.items()}
    own = _run(template, changed, axes, data, targets)
    for name, moments in own.items():
        scale, shift = _affine(moments, targets[name])
        weight, bias = changed[name], changed[moments.bias]
        units = [1] * weight.ndim
        units[axes[name]] = -1
        weight.copy_(weight.to(scale.dtype) * scale.view(units))
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


def _device(tensors: Mapping[str, Tensor]) -> torch.device:
    return next(tensor.device for tensor in tensors.values() if tensor.is_floating_point())


@torch.no_grad()
def _run(
    template: nn.Module,
    tensors: Mapping[str, Tensor],
    axes: Mapping[str, int],
    data: Iterable[Any],
    targets: Mapping[str, _Moments] | None,
) -> dict[str, _Moments]:
    layers = _Outputs(tensors, axes, targets)
    batches = 0
    with evaluating(template), exactly(_device(tensors)), layers:
        for images in images_in(data, tensors, "rescale"):
            batches += 1
            call(template, tensors, images)
    if not batches:
        raise ValueError("rescale: data must yield at least one batch of images, got none")
    if not layers.sums:
        raise ValueError(
            "rescale: no layer that makes units has a bias to shift; for networks with BatchNorm "
            "there is reestimate_batchnorm"
        )
    found = {name: layers.moments(name) for name in layers.sums}
    broken = [name for name, own in found.items() if not own.deviation.isfinite().all()]
    faults = [f"outputs of {name} are NaN or infinite" for name in broken]
    faults += _used_twice(template, found)
    faults += [
        f"{name} runs {runs} times in {batches} batches, and every run would need its own scale"
        for name, runs in layers.runs.items()
        if runs > batches
    ]
    _checks.raise_all("rescale", faults)
    return found


def _used_twice(template: nn.Module, layers: Mapping[str, _Moments]) -> Iterator[str]:
    """Of the weights that are rescaled and their biases, those that more than one layer has."""
    weights_of: dict[str, list[str]] = {}
    for name, own in layers.items():
        weights_of.setdefault(own.bias, []).append(name)
    for bias, weights in weights_of.items():
        if len(weights) > 1:
            yield f"{bias} is the bias of {' and '.join(weights)}, each of which would shift it"
    names_of: dict[int, list[str]] = {}
    for name, tensor in _experts.tensors_of(template).items():
        names_of.setdefault(id(tensor), []).append(name)
    for names in names_of.values():
        if len(names) > 1 and (layers.keys() | weights_of.keys()) & set(names):
            yield f"{' and '.join(names)} are one tensor, which would need a scale for each layer"


class _Outputs(Layers):
    """Sums up the batches' moments of every layer, and repairs its output if told the targets.

    Args:
        tensors: of the network that is run.
        axes: of the weights that make units, along which axis.
        targets: by weight; None only sums up.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        axes: Mapping[str, int],
        targets: Mapping[str, _Moments] | None,
    ) -> None:
        super().__init__(tensors)
        self._axes, self._targets = axes, targets
        self.sums: dict[str, tuple[int, Tensor, Tensor, str]] = {}
        self.runs: Counter[str] = Counter()

    def moments(self, name: str) -> _Moments:
        count, mean, variance, bias = self.sums[name]
        return _Moments(mean / count, (variance / count).sqrt(), bias)

    def product(self, x: Tensor, part: Part, bias: Part | None, result: Tensor) -> Tensor:
        name = self._bias_of(part, result) if bias is None else bias.name
        if part.name not in self._axes or name is None or not self._is_whole(part, result):
            return result
        self.runs[part.name] += 1
        # torch adds the bias of a linear layer afterwards where its input is no rows in memory.
        later = self.tensors[name].double() if bias is None else 0.0
        flat = result.flatten(0, -2).double() + later
        variance, mean = torch.var_mean(flat, 0, correction=0)
        count, means, variances, _ = self.sums.get(part.name, (0, 0, 0, ""))
        n = len(flat)
        self.sums[part.name] = count + n, means + n * mean, variances + n * variance, name
        if self._targets is None:
            return result
        scale, shift = _affine(_Moments(mean, variance.sqrt(), name), self._targets[part.name])
        shift += (scale - 1) * later
        return torch.addcmul(shift.to(result.dtype), result, scale.to(result.dtype))

    def _is_whole(self, part: Part, result: Tensor) -> bool:
        """Not a part of a fused projection."""
        return result.shape[-1] == self.tensors[part.name].shape[self._axes[part.name]]

    def _bias_of(self, part: Part, result: Tensor) -> str | None:
        """The bias beside a weight, by its name."""
        name = part.name.removesuffix("weight") + "bias"
        known = part.name.endswith("weight") and name in self.tensors
        return name if known and self.tensors[name].shape == result.shape[-1:] else None
