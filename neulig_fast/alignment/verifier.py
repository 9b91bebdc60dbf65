"""Is a specification right? Units are re-ordered, and the function must stay what it was."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from .. import _checks
from .inputs import InconclusiveError, as_float64, example_inputs
from .permutation import random_order
from .spec import Node, Spec, check_tensors, reorder

TOLERANCE = 1e-9  # relative, in float64: rounding stays far below, a wrong axis far above
_LISTED = 6


def verify(model: nn.Module, spec: Spec, inputs: Any = None, seed: int = 0) -> None:
    """Check that every order ``spec`` allows leaves the model's function as it is.

    A deep copy is given weights under which no tensor is idle (a fresh network has zero biases,
    LayerScale gains near zero, running statistics 0 and 1, and would hide most errors), run in
    float64 and eval mode, re-ordered at random in every node, and run again; then in about log2 as
    many subsets of nodes as there are, so that no two nodes always move together.

    Args:
        model: left as it is.
        spec: to be judged.
        inputs: a tensor, or a tuple of them, as the model takes; None makes images, vectors or
            words up, in the size that its first layer asks for.
        seed: of weights, inputs and orders.

    Raises:
        ValueError: the outputs change by more than 1e-9 of the largest: every node that is at
            fault, with the tensors left out of the spec that could have its units. Or the spec
            has tensors that the model lacks; or nothing can be told: ``inputs`` is None and none
            can be made up, or tensors of the model are on the meta device.
    """
    state = model.state_dict()
    check_tensors(spec, state, "verify")
    empty = [name for name, tensor in state.items() if tensor.is_meta]
    faults = (f"{name} is on the meta device and has no values" for name in empty)
    _checks.raise_all("verify", faults, InconclusiveError)
    trial = _Trial(model, spec, inputs, torch.Generator().manual_seed(seed))
    moves = _moves(spec)
    if all(trial.change(some, seed + k) <= TOLERANCE for k, some in enumerate(_subsets(moves))):
        return
    found = [
        f"{move.words} changes the outputs by {change:.1e} of the largest"
        + _left_out(model, spec, move.nodes)
        for move in moves
        if (change := trial.change([move], seed)) > TOLERANCE
    ]
    _checks.raise_all("verify", found or ["nodes change the outputs together, though none alone"])


class _Move(NamedTuple):
    """Blocks put in another order, or units inside their blocks: what a spec takes for free."""

    words: str
    nodes: list[Node]
    inside: bool


def _moves(spec: Spec) -> list[_Move]:
    ties: dict[str, list[Node]] = {}
    found = []
    for name, node in spec.nodes.items():
        if node.blocks > 1:
            ties.setdefault(node.tie or name, []).append(node)
        if node.block_size > 1:
            where = " inside its blocks" if node.blocks > 1 else ""
            found.append(_Move(f"re-ordering node {name}{where}", [node], inside=True))
    for nodes in ties.values():
        names = ", ".join(node.name for node in nodes)
        found.append(_Move(f"re-ordering the blocks of node {names}", nodes, inside=False))
    return found


def _subsets(moves: list[_Move]) -> Iterator[list[_Move]]:
    """All moves; and few subsets of which one at least has only one of any two moves.

    Nodes that must move together, and that a spec takes for two, may do so by chance in a draw of
    all: with two heads there is one order besides the identity.
    """
    yield moves
    for bit in range(len(moves).bit_length()):
        yield [move for k, move in enumerate(moves, 1) if k >> bit & 1]


class _Trial:
    """A model with weights that matter, its inputs, and what it makes of them."""

    def __init__(
        self, model: nn.Module, spec: Spec, inputs: Any, generator: torch.Generator
    ) -> None:
        self.spec = spec
        self.model = copy.deepcopy(model).to("cpu", torch.float64).eval()
        _make_weights_matter(self.model, generator)
        self.state = self.model.state_dict()
        made = example_inputs(self.model, generator) if inputs is None else inputs
        self.inputs = as_float64(made)
        self.outputs = self._run(self.state)
        self.scale = _largest(self.outputs)
        if not 0 < self.scale < float("inf"):
            raise InconclusiveError(
                f"verify: the largest output is {self.scale}, which tells nothing; "
                "pass other inputs"
            )

    def change(self, moves: list[_Move], seed: int) -> float:
        """The largest difference that ``moves`` make, relative to the largest output."""
        blocks = {node.name for move in moves if not move.inside for node in move.nodes}
        inside = {node.name for move in moves if move.inside for node in move.nodes}
        moving = {name: self.spec.nodes[name] for name in blocks | inside}
        match = {
            name: random_order(node, seed, name in blocks, name in inside)
            for name, node in moving.items()
        }
        # Gigabytes stay where they are if the spec of what stays is not asked.
        part = Spec(moving.values(), [use for use in self.spec.uses if use.node in moving])
        outputs = self._run(reorder(part, match, self.state))
        change = _largest(y - x for y, x in zip(outputs, self.outputs, strict=True))
        return (float("inf") if math.isnan(change) else change) / self.scale

    @torch.no_grad()
    def _run(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        # Activations may work in place, on the inputs too.
        inputs = copy.deepcopy(self.inputs)
        outputs = functional_call(self.model, dict(state), inputs, tie_weights=False)
        leaves = pytree.tree_leaves(outputs)
        return [y for y in leaves if isinstance(y, Tensor) and y.is_floating_point()]


def _largest(outputs: Iterable[Tensor]) -> float:
    """Of the absolute values; NaN if one of them is, 0 if there are none."""
    found = [y.abs().max().double() for y in outputs if y.numel()]
    return float(torch.stack(found).max()) if found else 0.0


@torch.no_grad()
def _make_weights_matter(model: nn.Module, generator: torch.Generator) -> None:
    """Matrices anew, at a scale that keeps activations of size one; vectors around what they are.

    Buffers other than running statistics stay: they may be constants.
    """
    statistics = ("running_mean", "running_var")
    names = {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        is_statistic = name.rpartition(".")[2] in statistics
        if not tensor.is_floating_point() or not (name in names or is_statistic):
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu")
        if name.endswith("running_var"):
            tensor.mul_(torch.exp(0.3 * noise))
        elif tensor.ndim < 2:
            tensor.add_(noise, alpha=0.3)
        else:
            tensor.copy_(noise * (2 * tensor.shape[0] / tensor.numel()) ** 0.5)


def _left_out(model: nn.Module, spec: Spec, nodes: list[Node]) -> str:
    """Axes that no use covers, or not in full, and that have room for a node, or several times."""
    free = {
        (name, axis): length
        for name, tensor in model.state_dict().items()
        for axis, length in enumerate(tensor.shape)
    }
    for use in spec.uses:
        start, stop = spec.span(use)
        free[use.tensor, use.axis] -= stop - start
    found = [
        f"{name} axis {axis}"
        for (name, axis), length in free.items()
        if length and any(length % node.size == 0 for node in nodes)
    ]
    if not found:
        return ""
    return f"; not in the spec, though long enough: {_checks.listed(found, _LISTED)}"
