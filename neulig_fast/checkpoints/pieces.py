"""The slices of a recipe as a method sees them: which models are experts, and which is the base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .._checks import did_you_mean, raise_all
from ..methods import Method
from .parameters import Scope, look_up
from .recipe import ModelRef, Part, Recipe, Slice, Source


class Piece(NamedTuple):
    """A slice.

    Attributes:
        experts: what is merged.
        base: if the method wants one.
        scopes: of parameters, the slice's first.
        beside: for each expert the model that is read beside it, if the method wants one.
        listed: the recipe's sources, the base where it is one of them.
    """

    experts: tuple[Source, ...]
    base: ModelRef | None
    scopes: tuple[Scope, ...]
    beside: tuple[ModelRef | None, ...] = ()
    listed: tuple[Source, ...] = ()

    @property
    def layered(self) -> tuple[Source, ...]:
        """Experts and base with their layers; a base that is not listed has the first expert's."""
        if self.base is None:
            return self.experts
        own = [source for source in self.listed if source.model == self.base]
        return (*self.experts, *(own or [Source(self.base, self.experts[0].layers)])[:1])


def pieces_of(recipe: Recipe, method: Method) -> list[Piece]:
    """All slices of all modules, in order.

    Raises:
        ValueError: models that the method cannot merge, a parity that it does not have; all.
    """
    named = ((part, piece) for part in recipe.parts.values() for piece in part.slices)
    pieces = [_piece(recipe, part, piece, method) for part, piece in named]
    faults = [fault for piece in pieces for fault in _model_faults(piece, method)]
    raise_all("merge", dict.fromkeys([*faults, *_word_faults(recipe, method)]))
    return pieces


def _piece(recipe: Recipe, part: Part, piece: Slice, method: Method) -> Piece:
    base = piece.base or part.base or recipe.base
    experts = piece.sources
    if method.base != "one more":
        experts = tuple(source for source in experts if source.model != base)
    scopes = (piece.parameters, part.parameters, recipe.parameters)
    beside = tuple(_beside(source, scopes, method.beside) for source in experts)
    base = None if method.base == "one more" else base
    return Piece(experts, base, scopes, beside, piece.sources)


def models_beside(recipe: Recipe, method: Method) -> list[ModelRef]:
    """What a method reads beside the recipe's models.

    Raises:
        ValueError: as :func:`pieces_of`.
    """
    if method.beside is None:
        return []
    named = (model for piece in pieces_of(recipe, method) for model in piece.beside)
    return list(dict.fromkeys(model for model in named if model is not None))


def _beside(source: Source, scopes: tuple[Scope, ...], key: str | None) -> ModelRef | None:
    if key is None:
        return None
    named = look_up(key, "", 0.0, (source.parameters, *scopes))
    return ModelRef.parse(named) if isinstance(named, str) else None


def parity_of(recipe: Recipe, method: Method) -> str:
    """The framework whose meaning of the method is asked for."""
    return str(recipe.ours.get("parity", method.parities[0]))


def scope_of(recipe: Recipe, method: Method) -> str:
    """``model`` where the method sees the whole model as one tensor, else ``tensor``."""
    default = method.scopes.get(parity_of(recipe, method), "tensor")
    return str(recipe.ours.get("scope", default))


def _model_faults(piece: Piece, method: Method) -> Iterator[str]:
    if method.base == "needed" and piece.base is None:
        yield f"{method.name} needs a base_model: it merges differences to it"
    fewest, most, count = method.fewest, method.most, len(piece.experts)
    if fewest <= count and (most is None or count <= most):
        return
    wanted = f"{fewest} to {most}"
    if most is None:
        wanted = f"at least {fewest}"
    elif most == fewest:
        wanted = f"{fewest}"
    besides = " besides the base" if piece.base is not None else ""
    many = "model" if wanted == "1" else "models"
    yield f"{method.name} merges {wanted} {many}{besides}, got {count}"


def _word_faults(recipe: Recipe, method: Method) -> Iterator[str]:
    scopes = ("tensor",) if method.of_model is None else ("tensor", "model")
    words = {"parity": (method.parities, parity_of(recipe, method))}
    words |= {"scope": (scopes, scope_of(recipe, method))}
    for key, (known, asked) in words.items():
        if asked not in known:
            hint = did_you_mean(asked, known)
            yield f"neulig_fast.{key}: {method.name} has {', '.join(known)}, got {asked!r}{hint}"
