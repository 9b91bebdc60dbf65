"""Alignment of two networks (MuDSC): seconds per sweep, images/s of the statistics, the zip.

The published procedure is restated as its description has it: permutations are dense matrices that
multiply every tensor, similarities are those of the union of both networks' units, and all of it is
computed anew at every visit. Matchings are solved by the same functions on every side, so that what
differs is how similarities come about, and the order of visits is the same: results must be equal.
Every sweep of the restated loop does the same work, so one of them is timed; ours run to the end
and their time is spread over all their sweeps, the last ones included, in which nothing moves.

``planted``: one network and a permuted, noisy copy of it. ``unrelated``: two initialisations, a few
sweeps only; their similarities are noise, the hardest case for the assignment solver.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neulig_fast import alignment, testing
from neulig_fast.alignment.activations import ActivationMoments
from neulig_fast.alignment.networks import Networks
from neulig_fast.alignment.spec import Spec, check_match
from neulig_fast.alignment.sweeps import PATIENCE
from neulig_fast.alignment.zip import zip_units

from . import harness, machine
from .harness import Case, Provider
from .mudsc import Order, inner_product, plain_greedy, published, union_correlation, union_moments
from .towers import RN50, TOY, TOY_RN, VIT_B_32, image_tower

_NOISE, _SWEEPS, _IMAGES = 0.3, 2, 16
_TOYS = {"toy ViT": (8, TOY), "toy RN": (8, TOY_RN)}
_TOWERS = {**_TOYS, "ViT-B-32": (512, VIT_B_32), "RN50": (1024, RN50)}  # open_clip's
_SHAPES = ("ViT-B-32", "RN50", "resnet50")  # the last one torchvision's


class Pair(NamedTuple):
    """Two networks of one architecture."""

    shape: str
    spec: Spec
    networks: tuple[nn.Module, nn.Module]
    side: int  # of an image


def network(shape: str, seed: int) -> tuple[nn.Module, int]:
    """A randomly initialised network and the side of its images."""
    if shape == "resnet50":
        from torchvision.models import resnet50

        torch.manual_seed(seed)
        return resnet50().eval().requires_grad_(False), 224
    embed, vision = _TOWERS[shape]
    return image_tower(embed, vision, seed, "cpu"), vision["image_size"]


def pair(shape: str, kind: str) -> Pair:
    one, side = network(shape, 0)
    spec = alignment.spec_for(one)
    if kind == "unrelated":
        return Pair(shape, spec, (one, network(shape, 1)[0]), side)
    other, _ = alignment.random_permutation(one, spec, seed=1)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=g)
            parameter += _NOISE * parameter.std(correction=0) * noise
    return Pair(shape, spec, (one, other), side)


# -- cases ----------------------------------------------------------------------------------------


def sweep_case(shape: str, kind: str, similarity: str) -> Case:
    given = pair(shape, kind)
    limit = 100 if kind == "planted" else _SWEEPS
    restated = union_correlation if similarity == "correlation" else inner_product
    name = "published loop" if similarity == "correlation" else "Git Re-Basin with scipy"
    patience = PATIENCE if similarity == "correlation" else 1

    def align(order: str, sweeps: int = limit) -> alignment.Alignment:
        aligner = alignment.Aligner(given.networks, given.spec, similarity=similarity)
        return aligner.align(1.0, order=order, sweeps=sweeps)

    def published_sweep() -> tuple[str, Order]:
        return "one sweep", published(given.spec, given.networks, 1, restated)

    @functools.cache
    def expected(by: str) -> Order:
        if by == "one sweep":
            return align("seeded", sweeps=1).order(1)
        if by == "colour":
            return {}  # another order of visits may end elsewhere
        return published(given.spec, given.networks, limit, restated, patience)

    def check(result: tuple[str, Order]) -> None:
        by, orders = result
        check_match(given.spec, orders, "align")
        for node, order in expected(by).items():
            if not torch.equal(order, orders[node]):
                raise AssertionError(f"node {node}: this and the {name} match differently")

    sweeps = {order: len(align(order).values) for order in ("seeded", "colour")}
    found = [
        Provider(
            f"neulig_fast/{order}",
            lambda order=order: (order, align(order).order(1)),
            "ours",
            steps=sweeps[order],
            note=f"{sweeps[order]} sweeps",
        )
        for order in sweeps
    ]
    one = Provider(name, published_sweep, note="one sweep")
    what = "sweep" if similarity == "correlation" else "Git Re-Basin sweep"
    return _case(f"{kind} {what}", shape, [*found, one], check)


def activation_case(shape: str) -> Case:
    given = pair(shape, "planted")
    count = 2 if shape in _TOYS else _IMAGES
    g = torch.Generator().manual_seed(3)
    images = torch.randn(count, 3, given.side, given.side, generator=g)
    networks = Networks(given.networks)

    def ours() -> dict[str, Tensor]:
        moments = ActivationMoments(networks, given.spec, [(0, 1)])
        moments.collect([images])
        return {node: moments.similarity(node)[0, 1] for node in given.spec.nodes}

    @torch.no_grad()
    def theirs() -> dict[str, Tensor]:
        return union_moments(given.spec, given.networks, images)

    @torch.no_grad()
    def forwards() -> list[Tensor]:
        return [net(images) for net in given.networks]

    @functools.cache
    @torch.no_grad()
    def exact() -> dict[str, Tensor]:
        doubles = [copy.deepcopy(net).double() for net in given.networks]
        return union_moments(given.spec, doubles, images.double())

    def check(result: dict[str, Tensor]) -> None:
        samples = count * given.side**2  # of a unit, at most: one per pixel
        for node, working in theirs().items():
            try:
                testing.assert_within_rule(result[node], working, exact()[node], samples)
            except AssertionError as error:
                raise AssertionError(f"node {node}: {error}") from error

    found = [
        Provider("neulig_fast", ours, "ours", steps=count),
        Provider("published: second moments of the union", theirs, steps=count),
        Provider("the forward passes alone", forwards, "ceiling", steps=count),
    ]
    return _case("activation statistics per image", shape, found, check)


def zip_case(n: int) -> Case:
    g = torch.Generator().manual_seed(4)
    similarity = torch.corrcoef(torch.randn(2 * n, 4 * n, generator=g))

    def check(result: Tensor) -> None:
        if not torch.equal(result, plain_greedy(similarity, 2)):
            raise AssertionError("units are joined otherwise than by the plain greedy")

    found = [
        Provider("neulig_fast", lambda: zip_units(similarity, 2).merged.flatten(), "ours"),
        Provider("plain greedy", lambda: plain_greedy(similarity, 2)),
    ]
    return _case("zip", f"n {n}", found, check)


def _case(mode: str, shape: str, found: list[Provider], check: Callable[[Any], None]) -> Case:
    return Case(
        op="align",
        mode=mode,
        shape=shape,
        dtype=torch.float32,
        device="cpu",
        threads=machine.cores(),
        providers=found,
        check=check,
        numbers={"N": 2},
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    if device != "cpu":
        return
    for shape in _TOYS if quick else _SHAPES:
        yield activation_case(shape)
        for kind in ("planted", "unrelated"):
            yield sweep_case(shape, kind, "correlation")
        yield sweep_case(shape, "planted", "inner_product")
    yield zip_case(24 if quick else 768)


if __name__ == "__main__":
    harness.main("align", cases)
