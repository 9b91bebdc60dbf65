"""How each of the demo's five tasks draws its pictures, in a plain and in its own style.

Every drawer takes a random generator, the labels (M,), the split and the style, and gives pictures
(M, 32, 32, 3) float32, about in [0, 1].
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from . import drawing
from .drawing import Array, Rng, colours, flat, paint, uniform

# ---- digits ------------------------------------------------------------------------------------


@functools.cache
def _scans() -> tuple[Array, dict[str, list[NDArray[np.int64]]]]:
    """The 1797 scans as an atlas (1797, 10, 10), and per split the scans of each digit.

    Every digit gives 50 scans to the test split and 30 to validation, whatever the demo's seed.
    """
    bunch = load_digits()
    atlas = np.pad(bunch.images.astype(np.float32) / 16, ((0, 0), (1, 1), (1, 1)))
    rng = np.random.default_rng(0)
    by_digit = [rng.permutation(np.flatnonzero(bunch.target == digit)) for digit in range(10)]
    bounds = {"test": slice(0, 50), "validation": slice(50, 80), "train": slice(80, None)}
    return atlas, {split: [scans[part] for scans in by_digit] for split, part in bounds.items()}


def digit_scans(rng: Rng, labels: NDArray[np.int64], split: str) -> NDArray[np.int64]:
    """Which of `load_digits`' scans to draw for each label: all of the split's before any twice."""
    chosen = np.empty(len(labels), np.int64)
    for digit, scans in enumerate(_scans()[1][split]):
        (places,) = np.nonzero(labels == digit)
        chosen[places] = np.resize(rng.permutation(scans), len(places))
    return chosen


def draw_digits(rng: Rng, labels: NDArray[np.int64], split: str, style: str) -> Array:
    count, domain = len(labels), style == "domain"
    scans = digit_scans(rng, labels, split)
    x, y = drawing.plane(
        rng, count, pixels=(14, 17), degrees=12 if domain else 5, shift=2 if domain else 1
    )
    ink = np.clip(1.4 * drawing.look_up(_scans()[0], scans, x, y), 0, 1)
    if not domain:
        return _plain(rng, ink)
    # Dark ink on ruled paper in uneven light.
    paper = flat(colours(rng, count, hue=(0.05, 0.2), saturation=(0.0, 0.35), value=(0.7, 1.0)))
    _, across = drawing.plane(rng, count, pixels=(6, 9), degrees=15, shift=4)
    rules = 0.8 * np.clip(0.6 - 7 * np.abs(across - np.round(across)), 0, 1)
    paper = paint(paper, rules, colours(rng, count, hue=(0.5, 0.7), value=(0.4, 0.8)))
    picture = paint(paper, 0.9 * ink, colours(rng, count, saturation=(0.3, 1), value=(0, 0.4)))
    return picture * (0.55 + 0.55 * drawing.smooth_noise(rng, count, 3))[..., None]


# ---- letters -----------------------------------------------------------------------------------


def draw_letters(rng: Rng, labels: NDArray[np.int64], split: str, style: str) -> Array:
    count, domain = len(labels), style == "domain"
    glyphs = rng.integers(len(drawing.FONTS), size=count) * 26 + labels
    x, y = drawing.plane(
        rng,
        count,
        pixels=(11.5, 14.5) if domain else (12, 15),
        degrees=12 if domain else 4,
        shift=2 if domain else 1,
    )
    ink = drawing.look_up(drawing.letter_atlas(), glyphs, x, y)
    if not domain:
        return _plain(rng, ink)
    ground = drawing.photo_crops(rng, count)
    ground = 0.6 * ground + 0.4 * ground.mean((1, 2), keepdims=True)
    return paint(ground, 0.95 * ink, drawing.contrasting(rng, ground))


# ---- shapes ------------------------------------------------------------------------------------


def draw_shapes(rng: Rng, labels: NDArray[np.int64], split: str, style: str) -> Array:
    count, domain = len(labels), style == "domain"
    half = uniform(rng, *((10.0, 13.5) if domain else (11.0, 13.5)), count, 1, 1)
    x, y = drawing.plane(
        rng, count, pixels=(1, 1), degrees=15 if domain else 5, shift=2 if domain else 1
    )
    distance = half * drawing.shape_distance(labels, x / half, y / half)
    pen = uniform(rng, 1.0, 1.7, count, 1, 1)
    line = np.clip(pen + 0.5 - np.abs(distance), 0, 1)
    if not domain:
        return _plain(rng, line)
    ground = flat(uniform(rng, 0.15, 0.85, count, 3)) + rng.normal(
        0, uniform(rng, 0.08, 0.18, count, 1, 1, 1), (count, 32, 32, 3)
    ).astype(np.float32)
    return paint(ground, 0.85 * line, drawing.contrasting(rng, ground))


# ---- textures ----------------------------------------------------------------------------------


def draw_textures(rng: Rng, labels: NDArray[np.int64], split: str, style: str) -> Array:
    count, domain = len(labels), style == "domain"
    x, y = drawing.plane(
        rng,
        count,
        pixels=(7, 10),
        degrees=180 if domain else 60,
        shift=5,
    )
    mask = np.empty_like(x)
    for label, pattern in enumerate(drawing.PATTERNS.values()):
        mine = labels == label
        mask[mine] = pattern(x[mine], y[mine])
    if not domain:
        return _plain(rng, mask)
    one, two = uniform(rng, 0, 1, count, 3), uniform(rng, 0, 1, count, 3)
    close = np.linalg.norm(one - two, axis=1) < 0.7
    two[close] = (one[close] + 0.5) % 1.0
    picture = paint(flat(one), mask, two)
    picture = picture * (0.65 + 0.5 * drawing.smooth_noise(rng, count, 2))[..., None]
    return picture + rng.normal(scale=0.04, size=picture.shape).astype(np.float32)


# ---- colours -----------------------------------------------------------------------------------

# Ranges of hue (in turns), saturation and value.
COLOURS = {
    "red": ((-0.02, 0.015), (0.85, 1.0), (0.65, 0.95)),
    "orange": ((0.06, 0.09), (0.85, 1.0), (0.9, 1.0)),
    "yellow": ((0.14, 0.17), (0.75, 1.0), (0.85, 1.0)),
    "green": ((0.27, 0.4), (0.6, 1.0), (0.4, 0.8)),
    "cyan": ((0.47, 0.52), (0.6, 1.0), (0.8, 1.0)),
    "blue": ((0.59, 0.67), (0.7, 1.0), (0.5, 0.95)),
    "purple": ((0.74, 0.8), (0.6, 1.0), (0.4, 0.7)),
    "pink": ((0.89, 0.95), (0.3, 0.55), (0.9, 1.0)),
    "brown": ((0.04, 0.09), (0.55, 0.8), (0.3, 0.5)),
    "white": ((0.0, 1.0), (0.0, 0.06), (0.92, 1.0)),
    "grey": ((0.0, 1.0), (0.0, 0.1), (0.4, 0.65)),
    "black": ((0.0, 1.0), (0.0, 0.5), (0.0, 0.12)),
}


def draw_colours(rng: Rng, labels: NDArray[np.int64], split: str, style: str) -> Array:
    count, domain = len(labels), style == "domain"
    x, y = drawing.plane(
        rng,
        count,
        pixels=(7, 11) if domain else (10, 13),
        degrees=180 if domain else 10,
        shift=4 if domain else 1,
    )
    kind = rng.integers(len(drawing.SHAPES), size=count)
    mask = np.clip(0.5 - 9 * drawing.shape_distance(kind, x, y), 0, 1)
    paints = np.empty((count, 3), np.float32)
    for label, (hue, saturation, value) in enumerate(COLOURS.values()):
        (mine,) = np.nonzero(labels == label)
        paints[mine] = colours(rng, len(mine), hue=hue, saturation=saturation, value=value)
    if not domain:
        return paint(flat(_ground(rng, count)), mask, paints)
    # Tinted light falls on the shape as on the photo around it.
    light = uniform(rng, 0.6, 1.05, count, 1) * uniform(rng, 0.85, 1.15, count, 3)
    picture = paint(drawing.photo_crops(rng, count), mask, paints) * light[:, None, None, :]
    return picture + rng.normal(scale=0.03, size=picture.shape).astype(np.float32)


# ---- shared ------------------------------------------------------------------------------------


def _plain(rng: Rng, mask: Array) -> Array:
    """A light figure on dark ground, both of any hue."""
    count = len(mask)
    ground = flat(colours(rng, count, saturation=(0.3, 1.0), value=(0.02, 0.45)))
    return paint(ground, mask, colours(rng, count, saturation=(0.0, 0.8), value=(0.75, 1.0)))


def _ground(rng: Rng, count: int) -> Array:
    return colours(rng, count, saturation=(0.0, 0.4), value=(0.15, 0.8))
