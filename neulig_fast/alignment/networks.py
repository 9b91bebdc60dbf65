"""The experts that are to be aligned: their tensors, and the module that runs them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import _checks, _experts
from ..pool import ExpertPool

if TYPE_CHECKING:
    from .._experts import Expert


class Networks(Sequence[Mapping[str, Tensor]]):
    """State dicts of one architecture, and a module whose forward they are the numbers of.

    Args:
        experts: modules or state dicts, or an ``ExpertPool``. Not copied.
        template: the module that state dicts are of; default expert 0 when that is a module.

    Raises:
        TypeError: an expert that is neither module nor mapping.
        ValueError: experts that differ in keys, shapes, dtypes or devices or hold NaN or inf. Every
            mismatch is listed.
    """

    def __init__(
        self, experts: Iterable[Expert] | ExpertPool, template: nn.Module | None = None
    ) -> None:
        if isinstance(experts, (nn.Module, Mapping)):
            raise TypeError("align: experts must be a list of experts, got a single one")
        names: Sequence[str] | None = None
        if isinstance(experts, ExpertPool):
            template, names = template or experts.template, experts.names
            experts = [experts.state_dict(i) for i in range(experts.num_experts)]
        experts = list(experts)
        _experts.check_arguments(experts, template, None, None, False, subject="align")
        if template is None and isinstance(experts[0], nn.Module):
            template = experts[0]
        self.template = template
        self.names = tuple(names or (f"expert{i}" for i in range(len(experts))))
        check_devices("align", dict(zip(self.names, experts, strict=True)))
        dtype = _experts.arena_dtype(experts[0])
        _experts.check_tensors(experts, self.names, template, dtype, subject="align")
        self._tensors = [detached(expert) for expert in experts]
        self.dtype = _checks.accumulation_dtype(dtype)

    def __getitem__(self, i):
        return self._tensors[i]

    def __len__(self) -> int:
        return len(self._tensors)

    def parameters(self) -> list[str]:
        """Names of the float tensors that are no buffers."""
        floats = [name for name, t in self._tensors[0].items() if t.is_floating_point()]
        kinds = _experts.kinds(self.template, floats)
        return [name for name in floats if kinds[name] == "parameter"]

    @property
    def device(self) -> torch.device:
        """On which they all are."""
        return next(t.device for t in self._tensors[0].values() if t.is_floating_point())


def detached(expert: Expert) -> dict[str, Tensor]:
    """The state dict of a module or mapping, without gradients; nothing is copied."""
    return {name: tensor.detach() for name, tensor in _experts.tensors_of(expert).items()}


def check_devices(subject: str, networks: Mapping[str, Expert]) -> None:
    """ValueError unless all networks, by name, are on one device, on which sums can be kept."""
    places = {name: _devices(network) for name, network in networks.items()}
    devices = dict.fromkeys(device for on in places.values() for device in on)
    if len(devices) > 1:
        told = ", ".join(f"{name} on {' and '.join(on)}" for name, on in places.items() if on)
        raise ValueError(f"{subject}: all must be on one device, got {told}")
    _checks.raise_all(subject, filter(None, map(_checks.device_fault, devices)))


def _devices(network: Expert) -> list[str]:
    """Of the float tensors, which are what is compared."""
    tensors = _experts.tensors_of(network).values()
    floats = (t for t in tensors if isinstance(t, Tensor) and t.is_floating_point())
    return sorted({str(tensor.device) for tensor in floats})
