"""The tensors of a model, or of one of its modules: what will be done with each, and what is wrong.

A recipe's slices are laid one after the other; what is of no layer comes from the ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .._checks import did_you_mean
from ..methods import Method, Task
from . import dtypes, names, parameters
from .headers import Entry
from .layout import Output
from .modules import Own
from .pieces import Piece, parity_of, pieces_of
from .planned import Planned
from .recipe import ModelRef

_SHOWN = 20  # faults of a kind; a wrong model would have thousands


class Planner:
    """Collects planned tensors, faults and warnings.

    Attributes:
        donor: the model whose names the result has.
        faults: all so far, as :func:`one_line_each` takes them.
    """

    def __init__(self, own: Own, method: Method, seed: int) -> None:
        recipe, models = own.recipe, own.models
        self.recipe, self.method, self.models, self.seed = recipe, method, models, seed
        self.module = own.module
        self.faults: dict[tuple[str, str, str], None] = {}  # before, name, after
        self.warnings = [*recipe.warnings, *(n for m in models.values() for n in m.notes)]
        self.parity, self.pieces = parity_of(recipe, method), pieces_of(recipe, method)
        first = self.pieces[0]
        self.donor = first.base or recipe.base or first.experts[0].model

    # -- tensors ----------------------------------------------------------------------------------

    def tensors(self) -> list[Planned]:
        """Everything of the result, in the order of the donor's files."""
        if len(self.pieces) == 1 and all(s.layers is None for s in self.pieces[0].experts):
            return list(self._whole(self.pieces[0]))
        return list(self._sliced())

    def _whole(self, piece: Piece) -> Iterator[Planned]:
        donor = self.models[self.donor]
        counts = names.layer_counts(donor.entries)
        self._report_names(piece, donor.entries)
        for name, entry in donor.entries.items():
            parts = names.split(name)
            at = parameters.depth(parts and parts.layer, counts[parts.stack] if parts else 0)
            yield from self._named(name, entry, piece, at)

    def _named(self, name: str, like: Entry, piece: Piece, at: float) -> Iterator[Planned]:
        """A tensor that has the same name everywhere."""
        found = [self._entry(source.model, name) for source in piece.experts]
        base = self._entry(piece.base, name) if piece.base is not None else None
        yield from self._tensor(name, like, piece, found, base, at)

    def _sliced(self) -> Iterator[Planned]:
        """Layers of all slices one after the other; what is of no layer from the ends."""
        counts = {model: self._stack(model) for model in self._used()}
        if self.faults:
            return
        entries = self.models[self.donor].entries.items()
        plain = [(name, entry) for name, entry in entries if names.split(name) is None]
        first_words = self.module.first
        for name, entry in plain:
            if names.is_before_layers(name, first_words):
                yield from self._named(name, entry, self.pieces[0], 0.0)
        first = 0
        for piece in self.pieces:
            ranges = [s.layers or (0, counts[s.model][1]) for s in piece.layered]
            length = ranges[0][1] - ranges[0][0]
            yield from self._layers(piece, ranges, counts, first)
            first += length
        for name, entry in plain:
            if not names.is_before_layers(name, first_words):
                yield from self._named(name, entry, self.pieces[-1], 0.0)

    def _layers(
        self,
        piece: Piece,
        ranges: Sequence[tuple[int, int]],
        counts: Mapping[ModelRef, tuple[str, int]],
        first: int,
    ) -> Iterator[Planned]:
        lead = piece.experts[0].model
        entries = self.models[lead].entries
        start = ranges[0][0]
        length = ranges[0][1] - start
        self._report_layers(piece, ranges, entries)
        for name, entry in entries.items():
            parts = names.split(name)
            if parts is None or not start <= parts.layer < ranges[0][1]:
                continue
            layer = parts.layer - start
            found = [
                self._entry(s.model, parts._replace(stack=counts[s.model][0]).at(a + layer))
                for s, (a, _) in zip(piece.layered, ranges, strict=True)
            ]
            base = found.pop() if piece.base is not None else None
            at = parameters.depth(layer, length)
            yield from self._tensor(parts.at(first + layer), entry, piece, found, base, at)

    def _used(self) -> list[ModelRef]:
        used = [s.model for piece in self.pieces for s in piece.experts]
        used += [piece.base for piece in self.pieces if piece.base is not None]
        return list(dict.fromkeys([self.donor, *used]))

    def _stack(self, model: ModelRef) -> tuple[str, int]:
        """The one stack of layers of a model that slices are cut from, and its layers."""
        counts = names.layer_counts(self.models[model].entries)
        if len(counts) != 1:
            found = ", ".join(f"{stack}0..{n - 1}" for stack, n in counts.items()) or "none"
            hint = " (modules cuts each by itself)" if counts else ""
            self._fault(f"slices need models with one stack of layers; {model} has {found}{hint}")
            return "", 0
        stack, layers = next(iter(counts.items()))
        for piece in self.pieces:
            for source in piece.layered:
                if source.model == model and not _is_within(source.layers, layers):
                    cut = list(source.layers or ())
                    self._fault(f"layer_range {cut} of {model}, which has {layers} layers")
        return stack, layers

    # -- one tensor -------------------------------------------------------------------------------

    def _entry(self, model: ModelRef, name: str) -> Entry | None:
        entry = self.models[model].entries.get(name)
        if entry is None:
            self._fault(f"{model} has no ", repr(name))
        return entry

    def _tensor(
        self,
        name: str,
        like: Entry,
        piece: Piece,
        found: Sequence[Entry | None],
        base: Entry | None,
        at: float,
    ) -> Iterator[Planned]:
        beside = self._beside(like, piece, found)
        wanted = [*found, *([base] if piece.base is not None else []), *beside]
        sources = [entry for entry in wanted if entry is not None]
        if len(sources) < len(wanted) or not self._agree(name, sources, piece):
            return
        if not dtypes.is_float(like.dtype) or like.elements == 0:
            yield Planned(None, (like,), like.dtype, Output(name, like.dtype, like.shape))
            return
        settings = self._settings(name, piece, at)
        if settings is None:
            return
        task = Task(
            name=name,
            shape=like.shape,
            models=len(found),
            base=base is not None,
            settings=settings,
            dtype=dtypes.common([source.held for source in sources]),
            seed=self.seed,
            parity=self.parity,
        )
        for fault in self.method.faults(task):
            self._fault("", repr(name), f": {fault}")
        stored = self.recipe.out_dtype or self.recipe.dtype
        dtype = dtypes.TO_FORMAT[stored] if stored else like.like or like.dtype
        outputs = self.method.aside.outputs(task) if self.method.aside is not None else ()
        also = tuple(Output(*output) for output in outputs)
        output, own = Output(name, dtype, like.shape), self.method.piece(task)
        yield Planned(task, tuple(sources), task.dtype, output, None, also, own)

    def _beside(
        self, like: Entry, piece: Piece, found: Sequence[Entry | None]
    ) -> list[Entry | None]:
        """What is read beside the experts' tensors, where they are merged."""
        pairs = zip(piece.beside, found, strict=True) if dtypes.is_float(like.dtype) else ()
        return [self._entry(model, own.name) for model, own in pairs if model and own]

    def _agree(self, name: str, sources: Sequence[Entry], piece: Piece) -> bool:
        shapes = {entry.shape for entry in sources}
        kinds = {dtypes.is_float(entry.dtype) for entry in sources}
        models = [*(s.model for s in piece.experts), piece.base, *piece.beside]
        each = list(zip(filter(None, models), sources, strict=False))
        if len(shapes) > 1:
            got = ", ".join(f"{list(entry.shape)} in {model}" for model, entry in each)
            hint = "; another vocabulary?" if names.is_before_layers(name) else ""
            self._fault("", repr(name), f" must have one shape, got {got}{hint}")
        if len(kinds) > 1:
            got = ", ".join(f"{entry.dtype} in {model}" for model, entry in each)
            self._fault("", repr(name), f" must be of floats in all models or in none, got {got}")
        return len(shapes) == len(kinds) == 1

    def _settings(self, name: str, piece: Piece, at: float) -> dict[str, object] | None:
        """Values of all parameters of the method for a tensor; None if one has a fault."""
        found: dict[str, object] = {}
        right = True
        for key, parameter in self.method.parameters.items():
            whose = [(s.parameters, f" for {s.model}") for s in piece.experts]
            values = []
            for own, whom in whose if parameter.each else [({}, "")]:
                value = parameters.look_up(key, name, at, (own, *piece.scopes), parameter.default)
                faults = list(parameter.faults(value)) if value is not None else ["is missing"]
                for fault in faults:
                    self._fault(f"{key}{whom} {fault}")
                right = right and not faults
                values.append(value)
            found[key] = values if parameter.each else values[0]
        return found if right else None

    # -- faults -----------------------------------------------------------------------------------

    def _report_names(self, piece: Piece, known: Mapping[str, Entry]) -> None:
        """Tensors that the donor lacks would be lost."""
        for source in piece.experts:
            extra = [name for name in self.models[source.model].entries if name not in known]
            for name in extra:
                if name.endswith("lm_head.weight"):
                    self.warnings.append(
                        f"{source.model} has {name!r}, {self.donor} ties it to its embedding: "
                        "the result does so too"
                    )
                else:
                    hint = did_you_mean(name, known) if len(extra) <= _SHOWN else ""
                    self._fault(f"{self.donor} has no ", repr(name), f", {source.model} has{hint}")

    def _report_layers(
        self, piece: Piece, ranges: Sequence[tuple[int, int]], known: Mapping[str, Entry]
    ) -> None:
        """Tensors of layers that the first expert lacks there would be lost."""
        lead, (start, _) = piece.experts[0].model, ranges[0]
        places = {(p.layer - start, p.rest) for p in map(names.split, known) if p is not None}
        for source, (first, stop) in zip(piece.layered, ranges, strict=True):
            for name in self.models[source.model].entries:
                parts = names.split(name)
                if parts is None or not first <= parts.layer < stop:
                    continue
                if (parts.layer - first, parts.rest) not in places:
                    other = f" of layer {parts.layer - first + start}, {source.model} has {name!r}"
                    self._fault(f"{lead} has no ", repr(parts.rest.removeprefix(".")), other)

    def _fault(self, before: str, name: str = "", after: str = "") -> None:
        self.faults[before, name, after] = None


def _is_within(cut: tuple[int, int] | None, layers: int) -> bool:
    return cut is None or cut[0] < cut[1] <= layers
