"""Coefficients of a trained Portland for a recipe: what ``merge_method: neulig`` merges with.

    neulig_fast: {portland: FOLDER, dataset: NAME}

FOLDER is what :meth:`neulig_fast.NeuLig.save` wrote, and NAME one of its tasks. The mean CoopVec of
that task's calibration set, which ``fit`` has stored there, becomes the models' weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from .._checks import did_you_mean, raise_all
from .hub import folder_of
from .recipe import ModelRef, Part, Recipe, Slice, Source

METHOD = "neulig"
KEYS = ("portland", "dataset")  # of our section


def with_coefficients(recipe: Recipe, base: Path) -> Recipe:
    """The recipe, whose models have their weights if its method is NeuLig's.

    Args:
        base: relative folders are relative to it, or to the working directory.

    Raises:
        ValueError: a key that is missing or that the method does not read; a folder without
            a saved engine, or of other experts; an unknown data set; all that can be told at once.
    """
    ours = recipe.ours
    if recipe.method != METHOD:
        given = [f"neulig_fast.{key}: only {METHOD} reads it" for key in KEYS if key in ours]
        raise_all("recipe", given)
        return recipe
    missing = [key for key in KEYS if not isinstance(ours.get(key), str)]
    raise_all(
        "recipe",
        [f"neulig_fast.{key}: must be text, got {ours.get(key)!r}" for key in missing],
    )
    weights = _weights(recipe, ours["portland"], ours["dataset"], base)
    parts = {name: _weighed(part, weights) for name, part in recipe.parts.items()}
    return replace(recipe, parts=parts, beside={"coefficients": weights})


def _weights(recipe: Recipe, folder: str, dataset: str, base: Path) -> list[float]:
    from ..neulig.saving import read_vectors

    try:
        experts, vectors = read_vectors(folder_of(ModelRef(folder), base))
    except (OSError, ValueError) as error:
        raise ValueError(f"merge: neulig_fast.portland: {error}") from error
    faults = list(_model_faults(recipe, folder, experts))
    if vectors.get(dataset) is None:
        stored = [task for task, vector in vectors.items() if vector is not None]
        hint = did_you_mean(dataset, stored) or f" (known: {', '.join(stored) or 'none'})"
        what = "no calibration vector for" if dataset in vectors else "no data set"
        faults.append(f"neulig_fast.dataset: {folder} has {what} {dataset!r}{hint}")
    raise_all("merge", faults)
    vector = vectors[dataset]
    return [] if vector is None else [float(weight) for weight in vector]


def _model_faults(recipe: Recipe, folder: str, experts: Sequence[str]) -> Iterator[str]:
    pieces = [piece for part in recipe.parts.values() for piece in part.slices]
    own = [source.parameters for piece in pieces for source in piece.sources]
    scopes = [part.parameters for part in recipe.parts.values()] + [p.parameters for p in pieces]
    if any("weight" in scope for scope in (recipe.parameters, *scopes, *own)):
        yield f"weight: {METHOD} has weights from neulig_fast.portland, the recipe must have none"
    for piece in pieces:
        names = [Path(source.model.path).name for source in piece.sources]
        if len(names) != len(experts):
            yield (
                f"neulig_fast.portland: {folder} was trained for {len(experts)} experts "
                f"({', '.join(experts)}), the recipe has {len(names)} models"
            )
        elif names != list(experts) and sorted(names) == sorted(experts):
            yield (
                f"neulig_fast.portland: {folder} has the experts in the order "
                f"{', '.join(experts)}, the recipe {', '.join(names)}"
            )


def _weighed(part: Part, weights: Sequence[float]) -> Part:
    def weighed(piece: Slice) -> Slice:
        pairs = zip(piece.sources, weights, strict=True)
        return replace(piece, sources=tuple(_with(source, weight) for source, weight in pairs))

    return replace(part, slices=tuple(weighed(piece) for piece in part.slices))


def _with(source: Source, weight: float) -> Source:
    return replace(source, parameters={**source.parameters, "weight": weight})
