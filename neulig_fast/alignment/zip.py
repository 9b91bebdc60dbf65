"""Many-to-one matching: the units of N networks joined greedily into fewer (ZipIt, MuDSC).

Every unit of every network is a column at first. Until ``size`` columns are left, the pair of most
similarity C[i, j], i < j, is joined: column j goes into column i, whose similarities become
min(C[i], C[j]) * repeat. A column belongs to the network of its first member; joins of two columns
of one network have a budget. ZipIt (arXiv 2305.03053), MuDSC (arXiv 2403.01753).

With U the (units, merged) 0/1 matrix of the joins, an axis that produces units is multiplied by the
transpose of M, U with every column divided by its sum, times N; an axis that consumes them by U;
the merged tensor is the mean over the networks. Both products are sums over segments here. The
function of a network is not kept, not even where the joined units are the same, if a norm or a
product of queries and keys follows: only orders are symmetries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from ._greedy import join_greedily
from .assignment import in_float64, similarity_faults
from .match import check_nodes, match_nodes
from .spec import Node, block_order

# ZipIt's and MuDSC's.
REPEAT = 0.5
WITHIN = 1.0


@dataclass(frozen=True, eq=False)
class Zip:
    """Which merged unit each unit of each network went into.

    Attributes:
        merged: (N, n) int64: the merged unit of unit k of network i. Merged units are numbered by
            their first member, network by network.
        size: how many merged units there are.
        accepted: (N n - size,) fp64: the similarity of every join when it was made, in that order.
    """

    merged: Tensor
    size: int
    accepted: Tensor

    @property
    def value(self) -> float:
        """The mean accepted similarity; 0 if nothing was joined."""
        return float(self.accepted.sum()) / max(1, len(self.accepted))

    @property
    def counts(self) -> Tensor:
        """(size,) int64: the members of every merged unit, over all networks."""
        return torch.bincount(self.merged.flatten())


def zip_units(
    similarity: Tensor,
    networks: int,
    *,
    size: int | None = None,
    repeat: float = REPEAT,
    within: float = WITHIN,
) -> Zip:
    """Join the units of all networks greedily.

    Args:
        similarity: (N n, N n) over the union of the units, network by network; symmetric, any float
            dtype. Computed in fp64 from its upper triangle; the diagonal is not read.
        networks: N.
        size: merged units to end with; None is n, as many as one network has.
        repeat: what a join's similarities are multiplied with, to make another join of the same
            unit less likely, 0 < repeat <= 1. It makes a negative similarity larger, as in MuDSC.
        within: each network may have floor(within (N n - size) / N) joins between its own units,
            0 <= within <= 1.

    Returns:
        The joins. Of equal similarities the one with the smallest i, then the smallest j, is taken.

    Raises:
        TypeError: no tensor.
        ValueError: a similarity, a number of networks or a setting that cannot be; a ``size`` that
            the budgets do not allow.
    """
    _checks.check_tensors("zip_units", similarity=similarity)
    found = similarity_faults("similarity", similarity)
    units = similarity.shape[0] if similarity.ndim else 0
    if networks < 1 or units % networks:
        found.append(f"networks must divide the {units} units of the similarity, got {networks}")
    _checks.raise_all("zip_units", found)
    size = units // networks if size is None else size
    found = _setting_faults(units, networks, size, repeat, within)
    _checks.raise_all("zip_units", found + _symmetry_faults("similarity", similarity))
    return _join(in_float64(similarity), networks, size, repeat, within)


def zip_nodes(nodes: Sequence[Node], similarities: Sequence[Tensor], networks: int) -> list[Zip]:
    """Zip the nodes of one tie, or one node, to the size of one network.

    Blocks are put beside those of network 1 as :func:`~neulig_fast.alignment.match.match_nodes`
    puts them, and only units of blocks that stand together are joined, each such group with its own
    budgets. The merged units of group a are block a of the merged node. A node with
    ``shared_inner`` is joined alike in every group, by the mean of the groups' similarities.

    Args:
        nodes: one node, or several of the same tie.
        similarities: per node (N size, N size) over the union of the units, network by network;
            as in :func:`zip_units`.
        networks: N.

    Raises:
        TypeError: a similarity that is no tensor.
        ValueError: nodes that are not of one tie, similarities that do not fit them, are not
            symmetric, NaN or infinite.
    """
    if networks < 1:
        raise ValueError(f"zip_nodes: networks must be 1 or more, got {networks}")
    check_nodes("zip_nodes", nodes, similarities, networks)
    found: list[str] = []
    for node, similarity in zip(nodes, similarities, strict=True):
        found += _symmetry_faults(f"similarity of node {node.name}", similarity)
    _checks.raise_all("zip_nodes", found)
    blocks = _blocks_beside(nodes, similarities, networks)
    return [
        _zip_node(node, similarity, blocks)
        for node, similarity in zip(nodes, similarities, strict=True)
    ]


def zip_out(tensor: Tensor, zipped: Zip, network: int, axis: int) -> Tensor:
    """One network's tensor along an axis that produces units: the product with M, transposed.

    Args:
        tensor: (..., n, ...), a float dtype.
        zipped: the joins.
        network: whose tensor it is.
        axis: the axis of the n units.

    Returns:
        (..., size, ...), the dtype of ``tensor``: sums over the members in this network, times
        N / (members in all networks). Sums in fp32, fp64 for fp64.

    Raises:
        TypeError: no tensor.
        ValueError: an axis, dtype or network that does not fit.
    """
    scale = zipped.merged.shape[0] / zipped.counts.to(torch.float64)
    return _summed("zip_out", tensor, zipped, network, axis, scale)


def zip_in(tensor: Tensor, zipped: Zip, network: int, axis: int) -> Tensor:
    """One network's tensor along an axis that consumes units: the product with U.

    Arguments, result and errors as for :func:`zip_out`, without the scaling.
    """
    return _summed("zip_in", tensor, zipped, network, axis, None)


def _summed(
    subject: str, tensor: Tensor, zipped: Zip, network: int, axis: int, scale: Tensor | None
) -> Tensor:
    _checks.check_tensors(subject, tensor=tensor)
    networks, units = zipped.merged.shape
    found = []
    if tensor.dtype not in _checks.FLOAT_DTYPES:
        found.append(f"tensor must be fp32, bf16, fp16 or fp64, got {tensor.dtype}")
    if not 0 <= network < networks:
        found.append(f"network must be 0 .. {networks - 1}, got {network}")
    if not 0 <= axis < tensor.ndim or tensor.shape[axis] != units:
        got = f"axis {axis} of shape {_checks.shape(tensor)}"
        found.append(f"tensor must have an axis of the {units} units, got {got}")
    _checks.raise_all(subject, found)
    dtype = _checks.accumulation_dtype(tensor.dtype)
    # On the CPU, whose additions have an order; a GPU's index_add has none.
    shape = (*tensor.shape[:axis], zipped.size, *tensor.shape[axis + 1 :])
    sums = torch.zeros(shape, dtype=dtype, device="cpu")
    sums.index_add_(axis, zipped.merged[network], tensor.to("cpu", dtype))
    if scale is not None:
        trailing = (1,) * (tensor.ndim - axis - 1)
        sums *= scale.to(dtype).view(-1, *trailing)
    return sums.to(tensor.device, tensor.dtype)


def _join(similarity: Tensor, networks: int, size: int, repeat: float, within: float) -> Zip:
    budget = _budget(len(similarity), networks, size, within)
    labels, accepted = join_greedily(similarity.numpy(), networks, size, repeat, budget)
    _, merged = np.unique(labels, return_inverse=True)
    return Zip(torch.from_numpy(merged).view(networks, -1), size, torch.from_numpy(accepted))


def _budget(units: int, networks: int, size: int, within: float) -> int:
    return int((units - size) / networks * within)


def _setting_faults(
    units: int, networks: int, size: int, repeat: float, within: float
) -> list[str]:
    found = []
    if not 0 < repeat <= 1:
        found.append(f"repeat must be above 0 and at most 1, got {repeat}")
    if not 1 <= size <= units:
        found.append(f"size must be 1 .. {units}, got {size}")
    if not 0 <= within <= 1:
        found.append(f"within must be 0 to 1, got {within}")
    # Network 1 keeps a column for every unit that its budget does not join to another of its own.
    elif size < (least := units // networks - _budget(units, networks, size, within)):
        found.append(f"size must be at least {least}, which the budgets leave, got {size}")
    return found


def _symmetry_faults(name: str, similarity: Tensor) -> list[str]:
    # Half of the digits, fp32's at most: products of the same rows, rounded apart, agree in them.
    eps = max(torch.finfo(dtype).eps for dtype in (similarity.dtype, torch.float32))
    apart = float((similarity - similarity.mT).abs().max())
    if apart <= eps**0.5 * float(similarity.abs().max()):
        return []
    return [f"{name} must be symmetric, but entries across the diagonal differ by {apart:.3g}"]


def _blocks_beside(nodes: Sequence[Node], similarities: Sequence[Tensor], networks: int) -> Tensor:
    """(N, g): the block of every network that stands beside each of network 1."""
    rows = [torch.arange(nodes[0].blocks, device="cpu")]
    for network in range(1, networks):
        if nodes[0].blocks == 1:
            rows.append(rows[0])
            continue
        columns = [
            similarity[: node.size, network * node.size : (network + 1) * node.size]
            for node, similarity in zip(nodes, similarities, strict=True)
        ]
        orders, _ = match_nodes(nodes, columns)
        rows.append(block_order(nodes[0], orders[0]))
    return torch.stack(rows)


def _zip_node(node: Node, similarity: Tensor, blocks: Tensor) -> Zip:
    networks, m = len(blocks), node.block_size
    first = torch.arange(networks, device="cpu")[:, None] * node.size + blocks * m
    units = first.T[:, :, None] + torch.arange(m, device="cpu")
    units = units.flatten(1)  # (g, N m): the members of every group, in the union
    tiles = in_float64(similarity)[units[:, :, None], units[:, None, :]]
    if node.shared_inner:
        zips = [_join(tiles.mean(0), networks, m, REPEAT, WITHIN)] * node.blocks
    else:
        zips = [_join(tile, networks, m, REPEAT, WITHIN) for tile in tiles]
    merged = torch.empty(networks * node.size, dtype=torch.int64, device="cpu")
    for group, zipped in enumerate(zips):
        merged[units[group]] = zipped.merged.flatten() + group * m
    accepted = torch.cat([zipped.accepted for zipped in zips])
    return Zip(merged.view(networks, node.size), node.size, accepted)
