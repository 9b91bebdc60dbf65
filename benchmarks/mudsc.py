"""What bench_align compares with: the published procedures, restated without any shortcut.

Written after the descriptions in MuDSC (arXiv 2403.01753), Git Re-Basin (arXiv 2209.04836) and
ZipIt (arXiv 2305.03053), for two networks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neulig_fast.alignment.match import match_nodes
from neulig_fast.alignment.spec import Spec, Use
from neulig_fast.alignment.sweeps import grouped
from neulig_fast.alignment.taps import Taps

Order = dict[str, Tensor]


def published(
    spec: Spec,
    networks: Sequence[nn.Module],
    sweeps: int,
    similarity: Callable[..., Tensor],
    patience: int = 1,
) -> Order:
    """The loop of MuDSC in weight space: random orders, the best kept, everything anew."""
    groups = grouped(spec)
    states = [network.state_dict() for network in networks]
    current = {name: torch.arange(node.size) for name, node in spec.nodes.items()}
    generator = torch.Generator().manual_seed(0)
    best, best_value, stalled = dict(current), -1.0, 0
    for _ in range(sweeps):
        values = []
        for k in torch.randperm(len(groups), generator=generator).tolist():
            names = list(groups.values())[k]
            found = [similarity(spec, states, current, name) for name in names]
            orders, reached = match_nodes([spec.nodes[name] for name in names], found)
            current |= dict(zip(names, orders, strict=True))
            values += reached
        value = sum(values) / len(values)
        if value > best_value:
            best, best_value, stalled = dict(current), value, 0
        else:
            current, stalled = dict(best), stalled + 1
            if stalled == patience:
                break
    return best


def union_correlation(spec: Spec, states: Sequence[dict], current: Order, node: str) -> Tensor:
    """Both networks' units against both, permutations as matrices; the block that is needed."""
    rows = torch.cat([_rows(spec, states[i], current if i else None, node, True) for i in (0, 1)])
    n = spec.nodes[node].size
    return torch.corrcoef(rows)[:n, n:]


def inner_product(spec: Spec, states: Sequence[dict], current: Order, node: str) -> Tensor:
    """Git Re-Basin's: one block, permutations as index vectors."""
    rows = [_rows(spec, states[i], current if i else None, node, False) for i in (0, 1)]
    return rows[0] @ rows[1].T


def _rows(spec: Spec, state: dict, current: Order | None, node: str, dense: bool) -> Tensor:
    pieces = []
    for use in spec.uses_of(node):
        if use.role == "stat":
            continue
        start, stop = spec.span(use)
        tensor = state[use.tensor].narrow(use.axis, start, stop - start)
        for other in spec.uses_in(use.tensor) if current is not None else ():
            if other.axis != use.axis:
                tensor = _moved(tensor, other, spec, current[other.node], dense)
        pieces.append(tensor.movedim(use.axis, 0).reshape(spec.nodes[node].size, -1))
    return torch.cat(pieces, 1)


def _moved(tensor: Tensor, use: Use, spec: Spec, order: Tensor, dense: bool) -> Tensor:
    start, stop = spec.span(use)
    before, piece, after = tensor.split(
        [start, stop - start, tensor.shape[use.axis] - stop], dim=use.axis
    )
    if dense:
        matrix = torch.eye(len(order))[order]
        piece = (piece.movedim(use.axis, -1) @ matrix.T).movedim(-1, use.axis)
    else:
        piece = piece.index_select(use.axis, order)
    return torch.cat([before, piece, after], use.axis)


def union_moments(spec: Spec, networks: Sequence[nn.Module], images: Tensor) -> dict[str, Tensor]:
    """Second moments of both networks' activations stacked, per node; then the correlation."""
    seen: list[list[tuple[str, Tensor]]] = []
    for net in networks:
        rows: list[tuple[str, Tensor]] = []
        tensors = {k: v.detach() for k, v in net.state_dict(keep_vars=True).items()}
        with Taps(spec, tensors, lambda use, x, rows=rows: rows.append((use.node, x))):
            net(images)
        seen.append(rows)
    totals: dict[str, Any] = {}
    for (node, x), (_, y) in zip(*seen, strict=True):
        both = torch.cat([x.flatten(0, -2), y.flatten(0, -2)], 1)
        count, mean, square = totals.get(node, (0, 0, 0))
        totals[node] = count + len(both), mean + both.sum(0), square + both.T @ both
    found = {}
    for node, (count, mean, square) in totals.items():
        covariance = square / count - torch.outer(mean, mean) / count**2
        deviation = covariance.diagonal().clamp_min(0).sqrt()
        n = spec.nodes[node].size
        scale = torch.outer(deviation[:n], deviation[n:]).clamp_min(1e-7)
        found[node] = covariance[:n, n:] / scale
    return found


def plain_greedy(similarity: Tensor, networks: int) -> Tensor:
    """The zip as described: every round scans the whole matrix; -> merged unit of every unit."""
    c = similarity.double().numpy().copy()
    units, n = len(c), len(c) // networks
    c[np.tril_indices(units)] = -np.inf
    full = similarity.double().numpy().copy()
    owner, budget = np.arange(units) // n, np.full(networks, (units - n) // networks)
    label, alive = np.arange(units), np.ones(units, bool)
    for _ in range(units - n):
        i, j = divmod(int(c.argmax()), units)
        label[label == j] = i
        joined = np.minimum(full[i], full[j]) * 0.5
        full[i], full[:, i] = joined, joined
        alive[j] = False
        if owner[i] == owner[j]:
            budget[owner[i]] -= 1
        c = np.where(np.triu(alive[:, None] & alive[None], 1), full, -np.inf)
        for spent in np.flatnonzero(budget <= 0):
            own = owner == spent
            c[np.ix_(own, own)] = -np.inf
    return torch.from_numpy(np.unique(label, return_inverse=True)[1])
