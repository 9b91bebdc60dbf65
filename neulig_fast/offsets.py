"""Statistics of the experts' offsets from their mean: what the alignment penalties are made of.

theta_i is expert i's parameters, theta-bar their mean, xi_i = theta_i - theta-bar the offsets. Per
group of tensors (the whole model, a layer, one tensor):

    sums  S_i  = sum_p xi_i[p]                 gram  G_ij = <xi_i, xi_j>
    distances  D_ij = ||theta_i - theta_j||^2 = G_ii + G_jj - 2 G_ij

Everything here follows from S and G: the parameters are read once, by
:func:`neulig_fast.offset_gram`, and never again. NeuLig (arXiv 2503.01268); docs/neulig.md,
1 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import _checks


@dataclass(frozen=True, eq=False)
class OffsetStats:
    """Sums and Gram matrices of N experts' offsets, fp64 on the CPU.

    Args:
        sums: (N,) for the whole model, (L, N) for L groups.
        gram: (N, N) for the whole model, (L, N, N) for L groups. Made exactly symmetric: a BLAS
            may give G_ij and G_ji different last bits.
        labels: names of the L groups, in order; empty for the whole model.

    Raises:
        ValueError: shapes that do not fit each other or the labels.
    """

    sums: torch.Tensor
    gram: torch.Tensor
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sums", self.sums.detach().to("cpu", torch.float64))
        object.__setattr__(self, "gram", self.gram.detach().to("cpu", torch.float64))
        object.__setattr__(self, "labels", tuple(self.labels))
        leading = (len(self.labels),) if self.labels or self.sums.ndim == 2 else ()
        n = self.sums.shape[-1] if self.sums.ndim else 0
        found = []
        if n < 1 or tuple(self.sums.shape) != (*leading, n):
            found.append(
                "sums must be (N,), or (L, N) with L labels, "
                f"got {_checks.shape(self.sums)} and {len(self.labels)} labels"
            )
        if tuple(self.gram.shape) != (*self.sums.shape, n):
            found.append(
                f"gram must be (N, N), or (L, N, N) with L labels, got {_checks.shape(self.gram)} "
                f"for sums {_checks.shape(self.sums)}"
            )
        _checks.raise_all("OffsetStats", found)
        object.__setattr__(self, "gram", (self.gram + self.gram.mT) / 2)

    @classmethod
    def grouped(cls, sums: torch.Tensor, gram: torch.Tensor, labels: Sequence[str]) -> OffsetStats:
        """Add rows with the same label: (S, N), (S, N, N) and S labels become L groups.

        Groups are ordered by first appearance; rows are added in order, in fp64.
        """
        groups = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        index = torch.tensor([groups[label] for label in labels], dtype=torch.int64, device="cpu")

        def add(rows: torch.Tensor) -> torch.Tensor:
            rows = rows.to("cpu", torch.float64)
            return rows.new_zeros((len(groups), *rows.shape[1:])).index_add_(0, index, rows)

        return cls(add(sums), add(gram), tuple(groups))

    def __repr__(self) -> str:
        groups = f"{len(self.labels)} groups" if self.sums.ndim == 2 else "whole model"
        return f"OffsetStats({self.num_experts} experts, {groups})"

    @property
    def num_experts(self) -> int:
        """N."""
        return int(self.sums.shape[-1])

    def total(self, weights: torch.Tensor | Sequence[float] | None = None) -> OffsetStats:
        """Whole-model statistics: the groups added up, each times its weight.

        Args:
            weights: (L,), one per group; None is all ones. ``1 / trace`` of every group's Gram
                matrix keeps large layers from dominating, 0 leaves a group out.

        Raises:
            ValueError: not one weight per group.
        """
        if self.sums.ndim == 1 and weights is None:
            return self
        sums, gram = self._by_group()
        scale = sums.new_ones(len(sums)) if weights is None else _on_cpu(weights)
        if scale.shape != (len(sums),):
            raise ValueError(
                f"OffsetStats.total: weights must be ({len(sums)},), got {_checks.shape(scale)}"
            )
        return OffsetStats((scale[:, None] * sums).sum(0), (scale[:, None, None] * gram).sum(0))

    def _by_group(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.sums.ndim == 1:
            return self.sums.unsqueeze(0), self.gram.unsqueeze(0)
        return self.sums, self.gram

    @property
    def total_gram(self) -> torch.Tensor:
        """(N, N): G of the whole model."""
        return self.total().gram

    @property
    def zscores(self) -> torch.Tensor:
        """(N,): s_i = (S_i - mean S) / std S of the whole-model sums, divisor N - 1.

        With N = 1, or all N sums identical to the last bit, the ratio is 0 / 0 and s is defined as
        0. Sums that differ only by rounding are not identical: s then has unit variance like any
        other, and N = 2 always gives +-1 / sqrt(2).
        """
        sums = self.total().sums
        shifted = sums - sums[0]  # exact for close sums, whose mean would round to one of them
        largest = shifted.abs().max()
        if bool(largest == 0):
            return torch.zeros_like(sums)
        shifted = shifted / largest  # squares of tiny differences would underflow
        return (shifted - shifted.mean()) / shifted.std()

    @property
    def distances(self) -> torch.Tensor:
        """D_ij = ||theta_i - theta_j||^2, the shape of :attr:`gram`; never negative."""
        diagonal = self.gram.diagonal(dim1=-2, dim2=-1)
        squared = diagonal.unsqueeze(-1) + diagonal.unsqueeze(-2) - 2 * self.gram
        return squared.clamp_min(0)

    @property
    def traces(self) -> torch.Tensor:
        """tr G = sum_i ||xi_i||^2 = sum_{i<j} D_ij / N, () or (L,): how far apart experts are."""
        return self.gram.diagonal(dim1=-2, dim2=-1).sum(-1)

    def gram_normalized(self) -> torch.Tensor:
        """G (N - 1) / tr G per group, which has the trace of s s'.

        Zeros for a group whose experts coincide: trace 0, or, because rounding of the mean can
        leave equal offsets behind, all distances 0.
        """
        trace = self.traces[..., None, None]
        spread = self.distances.amax((-2, -1), keepdim=True)
        same = (trace == 0) | (spread == 0)
        scaled = self.gram * ((self.num_experts - 1) / trace.masked_fill(same, 1.0))
        return scaled.masked_fill(same, 0.0)

    def variance_matrix(self) -> torch.Tensor:
        """D / 2 over the mean off-diagonal entry of D, per group.

        w' A w is then the variance sum_i w_i ||theta_i - theta_w||^2 of a merge in units of the
        experts' mean squared distance (docs/neulig.md, 2): 0 for a one-hot w, (N - 1) / (2 N)
        for the uniform one. Zeros for a group whose experts coincide, and for N = 1.
        """
        n = self.num_experts
        mean = self.distances.sum((-2, -1), keepdim=True) / max(1, n * (n - 1))
        same = mean == 0
        return (0.5 * self.distances / mean.masked_fill(same, 1.0)).masked_fill(same, 0.0)

    def variance(self, weights: torch.Tensor | Sequence[float]) -> torch.Tensor:
        """V(w) = sum_i w_i ||theta_i - theta_w||^2 = w diag(G) - w' G w of a merge theta_w.

        It bounds how far a merge is from the ensemble of the same weights (docs/neulig.md, 2), and
        is exactly 0 for a one-hot w: computed as w' D w / 2, the same where w sums to 1.

        Args:
            weights: (N,) or (B, N), each row summing to 1.

        Returns:
            () or (B,), fp64; with L groups (L,) or (L, B), which add up to the model's.

        Raises:
            ValueError: weights of another shape.
        """
        w = self._weights("variance", weights)
        if self.sums.ndim == 1:
            return torch.einsum("...i,ij,...j->...", w, self.distances, w) / 2
        return torch.einsum("...i,lij,...j->l...", w, self.distances, w) / 2

    def dispersion(self, weights: torch.Tensor) -> torch.Tensor:
        """mean_b (w_b - w-bar)' G (w_b - w-bar): the cost of one merge for many weights.

        Merging with the mean weight w-bar instead of every sample's own w_b moves the parameters by
        this squared distance in the mean (docs/neulig.md, 2).

        Args:
            weights: (B, N), one row per sample, B >= 1.

        Returns:
            () fp64; with L groups (L,), which add up to the model's.

        Raises:
            ValueError: weights of another shape.
        """
        w = self._weights("dispersion", weights)
        if w.ndim != 2 or len(w) < 1:
            raise ValueError(
                "OffsetStats.dispersion: weights must be (B, N) with B >= 1, "
                f"got {_checks.shape(w)}"
            )
        centred = w - w.mean(0)
        return torch.einsum("bi,...ij,bj->...", centred, self.gram, centred) / len(w)

    def task_gram(self, base: int | None = None) -> torch.Tensor:
        """<tau_i, tau_j> of the task vectors tau_i = theta_i - base, the shape of :attr:`gram`.

        Args:
            base: an expert's index; None is the experts' mean, and then this is G.

        Raises:
            ValueError: no such expert.
        """
        if base is None:
            return self.gram
        if not 0 <= base < self.num_experts:
            raise ValueError(
                f"OffsetStats: base must be an expert 0 .. {self.num_experts - 1}, got {base}"
            )
        # (D_ib + D_jb - D_ij) / 2: distances keep their digits where G_bb is large beside them.
        distances = self.distances
        to_base = distances[..., base]
        return (to_base.unsqueeze(-1) + to_base.unsqueeze(-2) - distances) / 2

    def cosines(self, base: int | None = None) -> torch.Tensor:
        """Cosine similarities of the task vectors, the shape of :attr:`gram`.

        Args:
            base: as in :meth:`task_gram`.

        Returns:
            Entries in [-1, 1]; 1 on the diagonal; 0 where a task vector is zero, as the base's is;
            NaN where one is not finite.

        Raises:
            ValueError: no such expert.
        """
        gram = self.task_gram(base)
        length = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        present = length != 0  # NaN is present: a broken expert looks broken
        unit = length.masked_fill(~present, 1.0)
        cosines = (gram / unit.unsqueeze(-1) / unit.unsqueeze(-2)).clamp(-1, 1)
        both = present.unsqueeze(-1) & present.unsqueeze(-2)
        same = torch.eye(self.num_experts, dtype=torch.bool, device="cpu")
        same = same & length.isfinite().unsqueeze(-1)
        return cosines.masked_fill(same, 1.0).masked_fill(~both, 0.0)

    def kinship(self, base: int | None = None) -> torch.Tensor:
        """Model kinship (arXiv 2410.12613): the mean |cosine| over pairs of task vectors.

        Args:
            base: the model that all were tuned from, as an expert's index; it is no partner itself.
                None measures from the experts' mean, whose task vectors repel one another.

        Returns:
            () fp64; with L groups (L,).

        Raises:
            ValueError: no such expert, or fewer than two besides the base.
        """
        partners = self.num_experts - (base is not None)
        if partners < 2:
            raise ValueError(f"OffsetStats.kinship: needs two task vectors, got {partners}")
        cosines = self.cosines(base).abs()
        kept = [i for i in range(self.num_experts) if i != base]
        pairs = cosines[..., kept, :][..., kept].triu(1)
        return pairs.sum((-2, -1)) / (partners * (partners - 1) / 2)

    def _weights(self, method: str, weights: torch.Tensor | Sequence[float]) -> torch.Tensor:
        w = _on_cpu(weights)
        if w.ndim not in (1, 2) or w.shape[-1] != self.num_experts:
            raise ValueError(
                f"OffsetStats.{method}: weights must be (N,) or (B, N) with N = "
                f"{self.num_experts}, got {_checks.shape(w)}"
            )
        return w


def _on_cpu(values: torch.Tensor | Sequence[float]) -> torch.Tensor:
    """``values`` in fp64 on the CPU, whatever the default device is."""
    where = None if isinstance(values, torch.Tensor) else "cpu"
    return torch.as_tensor(values, device=where).to("cpu", torch.float64)
