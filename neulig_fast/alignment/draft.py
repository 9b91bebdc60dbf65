"""A specification in the making: units are followed through a network, and axes of tensors noted.

Rules (:mod:`.rules`) and the tracer write into one :class:`Draft`. Units that meet in a sum are
one set of units, *joined*: a union-find over the axes of activations. What the model is given and
what it returns stays in order, and so does all that is joined to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from ..encoders.rules import join, kind
from .rules import refusal, rule_of, where
from .spec import Node, Role, Spec, Use

# Where units lie in an activation: "channels" is dimension 1 of (B, C, ...), "last" the last of
# (B, ..., C); "repeated" and "tiled" are the two after a Flatten. "any": that of the model's input.
Layout = Literal["any", "channels", "last", "repeated", "tiled"]


@dataclass(eq=False)
class Axis:
    """Units of some layer, or, once joined, of several; ``into`` is what it became part of."""

    name: str
    rank: int  # in order of making: a joined axis bears the first name, whichever sum came first
    size: int | None  # None: of the model's input, which is never asked
    blocks: int = 1
    shared_inner: bool = False
    fixed: bool = False
    into: Axis | None = None

    def root(self) -> Axis:
        """What this axis is part of by now."""
        axis = self
        while axis.into is not None:
            axis = axis.into
        return axis


@dataclass(frozen=True)
class Units:
    """What a rule is given and returns: units, and how they lie in an activation or a tensor.

    Attributes:
        axis: the units; ``size`` of them.
        layout: where they lie.
        inner: the last dimension has the units of one block, block beside block in another one.
        part: the entries of a tensor's axis that are theirs; None is all of them.
    """

    axis: Axis
    layout: Layout = "last"
    inner: bool = False
    part: tuple[int, int] | None = None

    @property
    def size(self) -> int | None:
        """How many units; None for the model's input."""
        return self.axis.root().size

    def at(self, layout: Layout) -> Units:
        """The same units, lying elsewhere."""
        return replace(self, layout=layout)

    def entries(self, start: int, stop: int) -> Units:
        """For tensors of which only the entries ``start .. stop`` of an axis are these units."""
        return replace(self, part=(start, stop))

    def inside(self) -> Units:
        """For what is applied block by block with the same tensors, as a norm of every head is."""
        return replace(self, inner=True)


class Draft:
    """What is known so far.

    Args:
        unknown: follows units through a module that has no rule, as a rule would.
    """

    def __init__(self, unknown: Callable[[Draft, Any, str, Units], Any]) -> None:
        self._unknown = unknown
        self._made = 0
        self._tied: list[tuple[Axis, Axis]] = []
        self._uses: dict[tuple[str, int, int], tuple[Axis, Use]] = {}
        self._seen: dict[tuple[int, int, int], tuple[Tensor, Units]] = {}
        self.guessed: list[str] = []

    # -- units ------------------------------------------------------------------------------------

    def units(self, name: str, size: int, blocks: int = 1, layout: Layout = "last") -> Units:
        """New units, called after what makes them."""
        self._made += 1
        return Units(Axis(name, self._made, size, blocks), layout)

    def given(self) -> Units:
        """The model's input."""
        return Units(Axis("the model's input", 0, None, fixed=True), "any")

    def join(self, x: Units, y: Units) -> Units:
        """Both move together from now on, because they are added, multiplied or otherwise met.

        Raises:
            ValueError: their sizes or blocks differ.
        """
        a, b = x.axis.root(), y.axis.root()
        if a is b:
            return x
        kept, gone = (a, b) if a.rank < b.rank else (b, a)
        if not (a.fixed or b.fixed):
            if a.size != b.size:
                raise ValueError(
                    f"spec_for: {gone.name} makes {gone.size} units that are joined to the "
                    f"{kept.size} of {kept.name}"
                )
            self.split(Units(kept), gone.blocks, gone.name)
        kept.shared_inner |= gone.shared_inner
        kept.fixed |= gone.fixed
        gone.into = kept
        return y if x.layout == "any" else x

    def split(self, x: Units, blocks: int, name: str) -> None:
        """The units stay in ``blocks`` equal consecutive blocks; ``name`` is what asks for it.

        Raises:
            ValueError: they are in another number of blocks already.
        """
        axis = x.axis.root()
        if blocks > 1 and axis.blocks > 1 and axis.blocks != blocks and not axis.fixed:
            raise ValueError(
                f"spec_for: {name} needs {blocks} blocks, but the units of {axis.name} that reach "
                f"it are in {axis.blocks}; all that meets in one stream needs the same number"
            )
        axis.blocks = max(axis.blocks, blocks)

    def tie(self, x: Units, y: Units) -> None:
        """The blocks of both are in the same order; the orders inside have nothing in common."""
        self._tied.append((x.axis, y.axis))

    def fix(self, value: Any) -> Any:
        """Keep units, alone or in tuples, lists and dicts, in the order they are in."""
        if isinstance(value, Units):
            value.axis.root().fixed = True
        elif isinstance(value, dict | list | tuple):
            for one in value.values() if isinstance(value, dict) else value:
                self.fix(one)
        return value

    # -- modules ----------------------------------------------------------------------------------

    def child(self, module: nn.Module, path: str, name: str, x: Units) -> Units:
        """Follow ``x`` through the submodule called ``name`` of the module at ``path``."""
        return self.apply(module.get_submodule(name), join(path, name), x)

    def chain(self, module: nn.Module, path: str, names: Iterable[str], x: Units) -> Units:
        """Through submodules one after the other; those that are None are left out."""
        for name in names:
            if getattr(module, name) is not None:
                x = self.child(module, path, name, x)
        return x

    def apply(self, module: nn.Module, path: str, x: Units) -> Any:
        """Follow ``x`` through the module at ``path``, by its rule if there is one.

        Raises:
            ValueError: the rule does not cover it; or there is none, and it cannot be traced.
        """
        rule = rule_of(module)
        if rule is None:
            self.guessed.append(f"{where(path)}, a {kind(module)}")
            return self._unknown(self, module, path, x)
        if (reason := refusal(module, rule)) is not None:
            raise ValueError(
                f"spec_for: {where(path)} is a {kind(module)} that the rule does not cover: "
                f"{reason}"
            )
        return rule.follow(self, module, path, x)

    def expect(self, x: Units, path: str, *layouts: Layout) -> None:
        """ValueError unless ``x`` lies in one of these ways."""
        if x.layout not in ("any", *layouts):
            raise ValueError(
                f"spec_for: {where(path)} is given units of {x.axis.root().name} that lie "
                f"{x.layout!r}; it is covered for {' or '.join(map(repr, layouts))} alone"
            )

    # -- tensors ----------------------------------------------------------------------------------

    def use(self, role: Role, x: Units, module: nn.Module, path: str, **axes: int) -> None:
        """Tensors of the module at ``path`` have ``x`` along an axis; those that are None do not.

        The same entries used twice, by a shared module or a shared tensor, join their units.

        Args:
            role: see :class:`~neulig_fast.alignment.Use`.
            x: the units.
            module: holds the tensors.
            path: the module's.
            axes: attribute -> axis.

        Raises:
            ValueError: an axis has no room for the units.
        """
        for name, axis in axes.items():
            tensor = getattr(module, name, None)
            if tensor is not None:
                self._use(role, x, tensor, join(path, name), axis)

    def _use(self, role: Role, x: Units, tensor: Tensor, key: str, axis: int) -> None:
        start, stop = x.part or (0, tensor.shape[axis])
        step, repeat = self._spacing(x, key, axis, stop - start)
        x.axis.root().shared_inner |= x.inner
        for first in range(start, stop, step):
            _, before = self._seen.setdefault((id(tensor), axis, first), (tensor, x))
            self.join(before, x)
            use = Use(key, axis, x.axis.name, role, first, repeat, x.inner)
            self._uses.setdefault((key, axis, first), (x.axis, use))

    def _spacing(self, x: Units, key: str, axis: int, length: int) -> tuple[int, int]:
        """How many entries one set of units takes, and how many of them each unit."""
        root = x.axis.root()
        if root.size is None:
            return length, 1
        units = root.size // root.blocks if x.inner else root.size
        if length % units or (length > units and x.layout not in ("repeated", "tiled")):
            raise ValueError(
                f"spec_for: {key} has {length} entries along axis {axis} for the {units} units "
                f"of {root.name}"
            )
        return (units, 1) if x.layout == "tiled" else (length, length // units)

    # -- the result -------------------------------------------------------------------------------

    def spec(self) -> Spec:
        """Nodes and uses of all units that are free to move."""
        ties: dict[str, str] = {}
        for group in self._tie_groups():
            if any(axis.fixed for axis in group):
                for axis in group:
                    axis.fixed = True
            elif len(group) > 1:
                ties.update((axis.name, group[0].name) for axis in group if axis.blocks > 1)
        roots = dict.fromkeys(axis.root() for axis, _ in self._uses.values())
        nodes = [
            Node(axis.name, axis.size, axis.blocks, ties.get(axis.name), axis.shared_inner)
            for axis in roots
            if not axis.fixed and axis.size is not None
        ]
        uses = [
            replace(use, node=axis.root().name)
            for axis, use in self._uses.values()
            if not axis.root().fixed
        ]
        return Spec(nodes, uses)

    def _tie_groups(self) -> list[list[Axis]]:
        groups: list[list[Axis]] = []
        for pair in self._tied:
            joined = [axis.root() for axis in pair]
            apart = []
            for group in groups:
                if any(axis in joined for axis in group):
                    joined = [*group, *joined]
                else:
                    apart.append(group)
            groups = [*apart, list(dict.fromkeys(joined))]
        return groups
