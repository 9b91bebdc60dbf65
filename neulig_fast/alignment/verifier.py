"""Is a specification right? Units are re-ordered, and the function must stay what it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from .. import _checks
from .inputs import as_float64, example_inputs
from .permutation import random_order
from .spec import Match, Node, Spec, check_tensors, reorder

TOLERANCE = 1e-9  # relative, in float64: rounding stays far below, a wrong axis far above
_LISTED = 6


def verify(model: nn.Module, spec: Spec, inputs: Any = None, seed: int = 0) -> None:
    """Check that every order ``spec`` allows leaves the model's function as it is.

    A deep copy is given weights under which no tensor is idle (a fresh network has zero biases,
    LayerScale gains near zero, running statistics 0 and 1, and would hide most errors), run in
    float64 and eval mode, re-ordered at random in every node, and run again.

    Args:
        model: left as it is.
        spec: to be judged.
        inputs: a tensor, or a tuple of them, as the model takes; None makes images, vectors or
            words up, in the size that its first layer asks for.
        seed: of weights, inputs and orders.

    Raises:
        ValueError: the outputs change by more than 1e-9 of the largest: every node that is at
            fault, with the tensors left out of the spec that could have its units. Or the spec
            has tensors that the model lacks; or ``inputs`` is None and none can be made up.
    """
    check_tensors(spec, model.state_dict(), "verify")
    generator = torch.Generator().manual_seed(seed)
    trial = _Trial(model, spec, inputs, generator)
    everything = {name: random_order(node, seed) for name, node in spec.nodes.items()}
    change = trial.change(everything)
    if change > TOLERANCE:
        faults = [
            f"{what} changes the outputs by {alone:.1e} of the largest{_left_out(model, spec, of)}"
            for what, of, match in _single_orders(spec, seed)
            if (alone := trial.change({**spec.identity(), **match})) > TOLERANCE
        ]
        together = f"re-ordering all nodes changes the outputs by {change:.1e}, none does alone"
        _checks.raise_all("verify", faults or [together])


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
        largest = max((float(y.abs().max()) for y in self.outputs if y.numel()), default=0.0)
        if not 0 < largest < float("inf"):
            raise ValueError(
                f"verify: the largest output is {largest}, which tells nothing; pass other inputs"
            )
        self.scale = largest

    def change(self, match: Match) -> float:
        """The largest difference that ``match`` makes, relative to the largest output."""
        outputs = self._run(reorder(self.spec, match, self.state))
        pairs = zip(outputs, self.outputs, strict=True)
        found = torch.tensor([float((y - x).abs().max()) for y, x in pairs if y.numel()])
        return float(found.nan_to_num(nan=float("inf")).max()) / self.scale

    @torch.no_grad()
    def _run(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        # Activations may work in place, on the inputs too.
        inputs = copy.deepcopy(self.inputs)
        outputs = functional_call(self.model, dict(state), inputs, tie_weights=False)
        leaves = pytree.tree_leaves(outputs)
        return [y for y in leaves if isinstance(y, Tensor) and y.is_floating_point()]


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
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            tensor.mul_(torch.exp(0.3 * noise))
        elif tensor.ndim < 2:
            tensor.add_(noise, alpha=0.3)
        else:
            tensor.copy_(noise * (2 * tensor.shape[0] / tensor.numel()) ** 0.5)


def _single_orders(spec: Spec, seed: int) -> Iterator[tuple[str, list[Node], Match]]:
    """One node after the other: (what is re-ordered, in words; its nodes; their orders).

    Blocks that are tied are re-ordered together, and each node inside its blocks alone.
    """
    ties: dict[str, list[Node]] = {}
    for name, node in spec.nodes.items():
        if node.tie is None:
            yield f"re-ordering node {name}", [node], {name: random_order(node, seed)}
        else:
            ties.setdefault(node.tie, []).append(node)
            order = random_order(node, seed, blocks=False)
            yield f"re-ordering node {name} inside its blocks", [node], {name: order}
    for nodes in ties.values():
        names = ", ".join(node.name for node in nodes)
        match = {node.name: random_order(node, seed, inside=False) for node in nodes}
        yield f"re-ordering the blocks of nodes {names}", nodes, match


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
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    return f"; not in the spec, though long enough: {', '.join(found[:_LISTED])}{more}"
