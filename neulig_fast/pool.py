"""ExpertPool: all experts' float tensors in one matrix, one row per expert, one layout."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Literal

import torch
from torch import nn

from . import _checks, _experts
from ._experts import Expert
from ._memory import large_pages
from .offsets import OffsetStats
from .ops.blend import blend
from .ops.offset_gram import offset_gram
from .segments import Segments

ALIGNMENT = 128  # bytes: a pair of CPU cache lines, one cache line of a GPU
_HASH_BYTES = 1 << 26  # copied from a GPU at a time
_RETURN_BYTES = 1 << 24  # consumed between two returns of freed memory


class ExpertPool:
    """N frozen experts of one architecture in an arena ``params`` (N, P).

    Row layout: the float parameters in state-dict order, then the float buffers (BatchNorm
    statistics). Every tensor starts on a 128-byte boundary, of the row and of memory; padding is
    zero. Merged models are rows of the same layout, so every state dict here is a dict of views.

    Integer and boolean entries (BatchNorm's counters, position ids) are not blended and never
    enter :meth:`offsets`: every expert's state dict holds those of expert 0, a merged model's holds
    copies of them.

    The experts are frozen: :attr:`fingerprint` and :meth:`offsets` remember what they computed.

    Args:
        experts: modules or state dicts with the same keys, shapes and dtypes.
        template: the module that state dicts are of. It tells parameters from buffers and runs
            all rows, always in eval mode, its own mode notwithstanding; it keeps that. Default:
            expert 0 itself, not a copy, when that is a module; else None, and then entries called
            running_mean, running_var or num_batches_tracked are buffers and all others parameters.
        names: one per expert, all different; default expert0, expert1, ...
        dtype: of the arena: fp32, bf16, fp16 or fp64. Default: the experts' own; if their tensors
            differ among each other, the type all of them promote to. ``segments`` keeps the
            originals.
        device: of the arena. Default: that of expert 0's first float tensor.
        consume: take the experts' memory over. Tensors move into the arena one at a time and
            their sources are released: state dicts are emptied, the parameters and buffers of
            modules become views of the arena (and take its dtype and device) and lose their
            gradients. Memory that something else holds, or that tensors share (a memory-mapped
            file), is released only with its last holder. Without it, experts are only read, and
            the arena is the one copy made.

    Raises:
        TypeError: an expert that is neither module nor mapping.
        ValueError: no experts, unfit names, or experts that differ in keys, shapes or dtypes, hold
            NaN or inf (or overflow ``dtype``), or are not dense float or integer tensors; modules
            that differ from the template in the type or settings of a submodule or in a buffer
            that is not saved. Every mismatch is listed (the same of many tensors:
            the first of them and their number), and nothing has been consumed.
    """

    def __init__(
        self,
        experts: Iterable[Expert],
        template: nn.Module | None = None,
        names: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        consume: bool = False,
    ) -> None:
        if isinstance(experts, (nn.Module, Mapping)):
            raise TypeError("ExpertPool: experts must be a list of experts, got a single one")
        experts = list(experts)
        _experts.check_arguments(experts, template, names, dtype, consume)
        if template is None and isinstance(experts[0], nn.Module):
            template = experts[0]
        labels = [f"expert {i}" for i in range(len(experts))]
        if names is not None:
            labels = [f"{label} ({name!r})" for label, name in zip(labels, names, strict=True)]
        dtype = dtype or _experts.arena_dtype(experts[0])
        _experts.check_tensors(experts, labels, template, dtype)

        self.names = tuple(names or (f"expert{i}" for i in range(len(experts))))
        self.template = template
        self._lay_out(_experts.tensors_of(experts[0]), dtype, device)
        self.params = _empty_arena(len(experts), self.segments.width, dtype, self._device)
        for row, expert in zip(self.params, experts, strict=True):
            self._fill(row, expert, consume)

    def _lay_out(
        self,
        tensors: dict[str, torch.Tensor],
        dtype: torch.dtype,
        device: torch.device | str | int | None,
    ) -> None:
        floats = {name: t for name, t in tensors.items() if t.is_floating_point()}
        kinds = _experts.kinds(self.template, list(floats))
        order = sorted(floats, key=lambda name: kinds[name] == "buffer")  # stable
        self.segments = Segments.pack(
            ((name, tuple(floats[name].shape), floats[name].dtype, kinds[name]) for name in order),
            ALIGNMENT // dtype.itemsize,
        )
        # Lengths of tensor, padding, tensor, padding, ...
        spans = self.segments.bounds.diff().tolist()
        pairs = ((s.length, span - s.length) for s, span in zip(self.segments, spans, strict=True))
        self._pieces = list(chain.from_iterable(pairs))
        self._keys = tuple(tensors)
        self._device = torch.device(
            next(iter(floats.values())).device if device is None else device
        )
        if self._device.type == "meta":
            raise ValueError("ExpertPool: device must hold values, got meta")
        self._integers = {
            name: tensor.detach().clone().to(self._device)
            for name, tensor in tensors.items()
            if name not in floats
        }

    def _fill(self, row: torch.Tensor, expert: Expert, consume: bool) -> None:
        """Copy one expert into its row, tensor by tensor, releasing each source if told to."""
        tensors: MutableMapping[str, torch.Tensor] = _experts.tensors_of(expert)
        if consume and isinstance(expert, MutableMapping):
            tensors = expert
        freed = 0
        for segment, end in zip(self.segments, self.segments.bounds[1:].tolist(), strict=True):
            source = tensors.pop(segment.name)
            view = row.narrow(0, segment.start, segment.length).view(segment.shape)
            view.copy_(source.detach())
            row[segment.start + segment.length : end].zero_()
            if consume and isinstance(expert, nn.Module):
                source.grad = None
                source.data = view
            del source
            freed += view.nbytes
            if consume and freed >= _RETURN_BYTES:
                _experts.return_freed_memory()
                freed = 0
        tensors.clear()

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.names)

    @property
    def num_params(self) -> int:
        """Float elements of one expert, parameters and buffers, without padding."""
        return sum(segment.length for segment in self.segments)

    @cached_property
    def _parameters(self) -> Segments:
        return self.segments.parameters()

    @property
    def num_parameter_columns(self) -> int:
        """``params[:, :num_parameter_columns]`` is the parameters, without buffers."""
        return self._parameters.width

    def __repr__(self) -> str:
        size = self.params.numel() * self.params.element_size() / 2**20
        return (
            f"ExpertPool({self.num_experts} experts x {self.num_params:,} params, "
            f"{size:,.1f} MiB, {self.params.dtype} on {self.params.device})"
        )

    def state_dict(self, i: int) -> dict[str, torch.Tensor]:
        """Expert ``i``'s state dict in the original key order: views of its row.

        The integers are the pool's own, which all experts share.

        Raises:
            IndexError: no expert ``i``.
        """
        if not -self.num_experts <= i < self.num_experts:
            raise IndexError(f"ExpertPool: expert must be below {self.num_experts}, got {i}")
        return self._views(self.params[i], self._integers)

    def row_state_dict(self, row: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state dict that a row of this layout holds, as views; gradients flow through.

        The integers are copies of expert 0's: a merged model has its own.

        Args:
            row: (P,), any dtype and device.

        Raises:
            ValueError: a row of another length.
        """
        if tuple(row.shape) != (self.segments.width,):
            expected = f"({self.segments.width},)"
            raise ValueError(f"ExpertPool: row must be {expected}, got {_checks.shape(row)}")
        return self._views(row, {name: t.clone() for name, t in self._integers.items()})

    def _views(
        self, row: torch.Tensor, integers: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # One split, because its gradient is one concatenation; a slice's is a row of zeros each.
        pieces = row.split(self._pieces)[::2]
        views = {
            segment.name: piece.view(segment.shape)
            for segment, piece in zip(self.segments, pieces, strict=True)
        }
        views.update(integers)
        return {key: views[key] for key in self._keys}

    def blend(self, weights: torch.Tensor | Sequence[float]) -> dict[str, torch.Tensor]:
        """The merged state dict sum_i w_i theta_i: views of one new row, in the arena's dtype.

        Args:
            weights: (N,), or (S, N) with one set per tensor of :attr:`segments`. Differentiable.

        Raises:
            ValueError: another shape.
        """
        if not isinstance(weights, torch.Tensor):
            weights = torch.tensor(weights, dtype=_checks.accumulation_dtype(self.params.dtype))
        expected = ((self.num_experts,), (len(self.segments), self.num_experts))
        if tuple(weights.shape) not in expected:
            raise ValueError(
                f"ExpertPool.blend: weights must be (N,) = ({self.num_experts},) or "
                f"(S, N) = {expected[1]}, got {_checks.shape(weights)}"
            )
        segments = None if weights.ndim == 1 else self.segments.bounds_on(self.params.device)
        return self.row_state_dict(blend(weights.to(self.params.device), self.params, segments))

    def offsets(self, by: Literal["model", "tensor", "layer"] = "model") -> OffsetStats:
        """Sums and Gram matrices of the parameters' offsets from the experts' mean.

        Buffers and integers are left out: step counters and running statistics would swamp the
        sums (NeuLig, arXiv 2503.01268, takes the whole state dict).

        Args:
            by: ``"model"``: one group, sums (N,) and gram (N, N). ``"tensor"``: a group per
                parameter. ``"layer"``: a group per label of :meth:`Segments.layers`.

        Raises:
            ValueError: another ``by``.
        """
        if by not in ("model", "tensor", "layer"):
            raise ValueError(f"ExpertPool.offsets: by must be model, tensor or layer, got {by!r}")
        stats = self._tensor_offsets
        if by == "layer":
            return OffsetStats.grouped(stats.sums, stats.gram, self._parameters.layers())
        return stats.total() if by == "model" else stats

    @cached_property
    def _tensor_offsets(self) -> OffsetStats:
        columns = self.params[:, : self.num_parameter_columns]
        sums, gram = offset_gram(columns, self._parameters.bounds_on(columns.device))
        return OffsetStats(sums, gram, self._parameters.names)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest (blake2b) of the experts' content: keys, shapes, dtypes and all values.

        Content, not identity: equal experts in equal order share it, whatever their names, device
        or origin. It says nothing about the template. Reads every value once, then is remembered.
        """
        digest = hashlib.blake2b(digest_size=32)
        entries = [(s.name, s.shape, str(s.dtype), s.kind) for s in self.segments]
        integers = [(k, tuple(v.shape), str(v.dtype)) for k, v in self._integers.items()]
        header = (self.num_experts, str(self.params.dtype), self._keys, entries, integers)
        digest.update(repr(header).encode())
        for tensor in chain(self.params, self._integers.values()):
            for block in tensor.reshape(-1).view(torch.uint8).split(_HASH_BYTES):
                digest.update(block.cpu().numpy())
        return digest.hexdigest()


def _empty_arena(n: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(n, width), not yet touched, starting on an ALIGNMENT boundary (torch's CPU grants 64)."""
    flat = torch.empty(n * width + ALIGNMENT // dtype.itemsize, dtype=dtype, device=device)
    large_pages(flat)
    skip = -flat.data_ptr() % ALIGNMENT // dtype.itemsize
    return flat[skip : skip + n * width].view(n, width)
