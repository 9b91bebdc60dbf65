"""What alignment found: matchings, how good they are, and the experts in their new order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _experts
from .._checks import accumulation_dtype, raise_all
from ..offsets import OffsetStats
from ..ops.offset_gram import offset_gram
from ..pool import ExpertPool
from . import files
from .matchings import Matchings, Orders, Zips
from .networks import detached
from .spec import Match, Spec, check_tensors, reorder, use_faults

if TYPE_CHECKING:
    from .._experts import Expert


@dataclass
class Alignment:
    """Matchings of N networks, and the experts they are of.

    Attributes:
        spec: what was matched.
        match: ``"align"`` or ``"zip"``.
        matchings: per node. ``"align"``: (N, n) int64, row i the order of expert i's units, row 0
            that of expert 0 as it is. ``"zip"``: a :class:`Zip`.
        balance: the share of the weights' similarity.
        value: the mean over nodes of the mean matched similarity; 0 where nothing was matched.
        values: the mean matched similarity per node, a dict for the start (with data) and for
            every sweep.
        distances_before, distances_after: (N, N) fp64, squared distances of the experts'
            parameters as given and as aligned; the latter None for ``"zip"``.
        converged: the sweeps ended because nothing got better.
        interrupted: they were stopped from outside; this is the best until then.
        experts: state dicts as given, not copied; empty after :meth:`load`.
        template: the module that runs them, or None.
        names: of the experts.
    """

    spec: Spec
    match: str
    matchings: dict[str, Any]
    balance: float
    value: float
    values: list[dict[str, float]]
    distances_before: Tensor
    distances_after: Tensor | None
    converged: bool
    interrupted: bool
    names: tuple[str, ...]
    experts: Sequence[Mapping[str, Tensor]] = field(default=(), repr=False)
    template: nn.Module | None = field(default=None, repr=False)

    @property
    def num_networks(self) -> int:
        """N."""
        return len(self.names)

    @property
    def trace_before(self) -> float:
        """tr G of NeuLig's bounds, sum_i ||theta_i - mean||^2, of the experts as given."""
        return float(self.distances_before.sum()) / (2 * self.num_networks)

    @property
    def trace_after(self) -> float | None:
        """The same of the aligned experts; None for ``"zip"``."""
        if self.distances_after is None:
            return None
        return float(self.distances_after.sum()) / (2 * self.num_networks)

    def order(self, i: int) -> Match:
        """The order of every node in expert ``i``.

        Raises:
            IndexError: no expert ``i``.
            ValueError: a zip, which is no order.
        """
        if self.match != "align":
            raise ValueError("Alignment: a zip joins units and gives no expert an order; see merge")
        if not -self.num_networks <= i < self.num_networks:
            n = self.num_networks
            raise IndexError(f"Alignment: expert must be {-n} to {n - 1}, got {i}")
        return {name: matching[i] for name, matching in self.matchings.items()}

    def apply(self, i: int, expert: Expert | None = None) -> dict[str, Tensor]:
        """The state dict of expert ``i`` in its new order: the same function.

        Args:
            expert: its module or state dict; default the one that was aligned. After :meth:`load`
                it must be given.

        Raises:
            IndexError: no expert ``i``.
            ValueError: a zip; tensors that the spec does not fit; no expert.
        """
        order = self.order(i)
        tensors = self.experts[i] if expert is None and self.experts else expert
        if tensors is None:
            raise ValueError("Alignment: a loaded alignment holds no experts; pass expert=")
        return reorder(self.spec, order, detached(tensors))

    def pool(self, experts: Iterable[Expert] | None = None, **settings: Any) -> ExpertPool:
        """An ``ExpertPool`` of the aligned experts.

        Args:
            experts: all N, in the order they were aligned in; default those.
            settings: of ``ExpertPool``; ``template`` and ``names`` default to what is known.

        Raises:
            ValueError: a zip; another number of experts; experts that do not fit.
        """
        given: list[Any] = [None] * self.num_networks if experts is None else list(experts)
        if len(given) != self.num_networks:
            raise ValueError(f"Alignment: needs {self.num_networks} experts, got {len(given)}")
        modules = [expert for expert in given if isinstance(expert, nn.Module)]
        settings.setdefault("template", modules[0] if modules else self.template)
        settings.setdefault("names", self.names)
        return ExpertPool([self.apply(i, expert) for i, expert in enumerate(given)], **settings)

    def merge(self, experts: Iterable[Expert] | None = None) -> dict[str, Tensor]:
        """The mean of the experts as matched: aligned, or zipped (MuDSC, section 3).

        Computed and returned on expert 0's device.
        Tensors that no node uses are averaged as they are; integers are expert 0's. BatchNorm's
        running statistics are averaged too and seldom fit: see ``reestimate_batchnorm``.

        Args:
            experts: all N; default those that were aligned.

        Raises:
            ValueError: no experts; such as differ, hold NaN or inf or do not fit the spec.
        """
        given = list(self.experts if experts is None else experts)
        if len(given) != self.num_networks:
            raise ValueError(f"Alignment: needs {self.num_networks} experts, got {len(given)}")
        if experts is not None:
            dtype = _experts.arena_dtype(given[0])
            _experts.check_tensors(given, self.names, None, dtype, subject="Alignment")
        networks = [detached(expert) for expert in given]
        check_tensors(self.spec, networks[0], "Alignment")
        matchings = self._matchings()
        return {name: merged_tensor(matchings, networks, name) for name in networks[0]}

    def merge_tensor(self, name: str, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor of :meth:`merge`.

        Args:
            name: as the networks have it; one that no node uses is averaged as it is.
            tensors: of all N, of one shape and dtype, on one device.

        Raises:
            ValueError: another number of tensors; tensors that differ or do not fit the spec.
        """
        faults = []
        if len(tensors) != self.num_networks:
            faults.append(f"needs {self.num_networks} tensors of {name}, got {len(tensors)}")
        shapes = sorted({tuple(tensor.shape) for tensor in tensors})
        if len(shapes) > 1:
            faults.append(f"{name} must have one shape, got {', '.join(map(str, shapes))}")
        kinds = sorted({f"{tensor.dtype} on {tensor.device}" for tensor in tensors})
        if len(kinds) > 1:
            faults.append(f"{name} must have one dtype and device, got {', '.join(kinds)}")
        if tensors:
            for use in self.spec.uses_in(name):
                faults += use_faults(self.spec, use, tensors[0])
        raise_all("Alignment", faults)
        networks = [{name: tensor.detach()} for tensor in tensors]
        return merged_tensor(self._matchings(), networks, name)

    def _matchings(self) -> Matchings:
        kind = Orders if self.match == "align" else Zips
        matchings = kind(self.spec, self.num_networks)
        matchings.current = dict(self.matchings)
        return matchings

    def save(self, path: str | Path) -> None:
        """Write the matchings, not the experts, as one safetensors file, atomically."""
        files.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Alignment:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no file of an alignment, or a damaged one.
        """
        return cls(**files.load(path))


def merged_tensor(
    matchings: Matchings, networks: Sequence[Mapping[str, Tensor]], name: str
) -> Tensor:
    """The mean over networks of one tensor with all axes as matched; integers are the first's."""
    first = networks[0][name]
    if not first.is_floating_point():
        return first.clone()

    def arranged(i: int) -> Tensor:
        tensor = networks[i][name].to(first.device, accumulation_dtype(first.dtype))
        for axis in range(tensor.ndim):
            uses = [use for use in matchings.spec.uses_in(name) if use.axis == axis]
            if uses:
                tensor = matchings.arrange(tensor, axis, uses, i)
        return tensor

    # Differences from the first, which are nothing where networks are equal: no copy is rounded.
    start = arranged(0)
    total = torch.zeros_like(start)
    for i in range(1, len(networks)):
        total += arranged(i) - start
    return (start + total / len(networks)).to(first.dtype)


def squared_distances(networks: Sequence[Mapping[str, Tensor]], names: Sequence[str]) -> Tensor:
    """(N, N) fp64: ||theta_i - theta_j||^2 over the tensors called ``names``."""
    n = len(networks)
    gram = torch.zeros(n, n, dtype=torch.float64, device="cpu")
    for name in names:
        rows = torch.stack([tensors[name].flatten() for tensors in networks])
        gram += offset_gram(rows)[1][0].cpu()
    return OffsetStats(gram.new_zeros(n), gram).distances
