"""Vectorised drawing of small images: glyph and shape atlases, photo crops, patterns, colours.

Everything here works on stacks: masks are (M, 32, 32) float32 in [0, 1], colours (M, 3), pictures
(M, 32, 32, 3) float32 in [0, 1]. Pixel coordinates are measured from the image's centre.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import hsv_to_rgb
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_sample_image

Array = NDArray[np.floating[Any]]
Rng = np.random.Generator

SIZE = 32
ATLAS = 64  # side of an atlas picture; its inner half-width is 1 in atlas units
FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}" for style in ("", "Bol", "Italic", "BolIta")),
    *("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10"),
)
SHAPES = (
    *("circle", "triangle", "square", "pentagon", "star"),
    *("heart", "cross", "moon", "arrow", "semicircle"),
)


# ---- coordinates -------------------------------------------------------------------------------


def uniform(rng: Rng, low: float, high: float, *shape: int) -> Array:
    """Uniform float32 numbers."""
    return rng.uniform(low, high, shape).astype(np.float32)


def plane(
    rng: Rng, count: int, *, pixels: tuple[float, float], degrees: float, shift: float
) -> tuple[Array, Array]:
    """Coordinates (count, 32, 32) of every pixel after a random turn, move and zoom.

    One unit of the result is `pixels` (a range) wide on the picture; the origin lies within
    `shift` pixels of its centre.
    """
    axis = np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2
    unit = uniform(rng, *pixels, count, 1, 1)
    angle = np.deg2rad(uniform(rng, -degrees, degrees, count, 1, 1))
    x = axis[None, None, :] - uniform(rng, -shift, shift, count, 1, 1)
    y = axis[None, :, None] - uniform(rng, -shift, shift, count, 1, 1)
    cos, sin = np.cos(angle), np.sin(angle)
    return (cos * x + sin * y) / unit, (cos * y - sin * x) / unit


def look_up(atlas: Array, index: NDArray[np.int64], x: Array, y: Array) -> Array:
    """Bilinear values of pictures `atlas[index]` (.., A, A) at atlas coordinates in [-1, 1].

    Outside of that the picture's edge continues.
    """
    side = atlas.shape[-1]
    column = np.clip((x + 1) * (side / 2) - 0.5, 0, side - 1.001)
    row = np.clip((y + 1) * (side / 2) - 0.5, 0, side - 1.001)
    left, top = column.astype(np.int64), row.astype(np.int64)
    dx, dy = column - left, row - top
    flat = atlas.reshape(-1)
    at = index[:, None, None] * (side * side) + top * side + left
    upper = flat[at] * (1 - dx) + flat[at + 1] * dx
    lower = flat[at + side] * (1 - dx) + flat[at + side + 1] * dx
    return (upper * (1 - dy) + lower * dy).astype(np.float32)


# ---- atlases -----------------------------------------------------------------------------------


@functools.cache
def letter_atlas() -> Array:
    """(fonts · 26, 64, 64): the capitals A-Z in every font, as large as fits, centred."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    pictures = []
    for name in FONTS:
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), 60)
        for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
            left, top, right, bottom = font.getbbox(letter)
            canvas = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8))
            ImageDraw.Draw(canvas).text((4 - left, 4 - top), letter, fill=255, font=font)
            ink = canvas.crop(canvas.getbbox())
            zoom = min(60 / ink.height, 60 / ink.width)
            size = (max(1, round(ink.width * zoom)), max(1, round(ink.height * zoom)))
            picture = Image.new("L", (ATLAS, ATLAS))
            corner = ((ATLAS - size[0]) // 2, (ATLAS - size[1]) // 2)
            picture.paste(ink.resize(size, Image.Resampling.BICUBIC), corner)
            pictures.append(np.asarray(picture, dtype=np.float32) / 255)
    return np.stack(pictures)


def _outline(name: str) -> NDArray[np.float64]:
    """The corners (V, 2) of a shape inside [-1, 1]²; y points down."""
    turn = np.linspace(0, 2 * np.pi, 72, endpoint=False)

    def regular(corners: int, radius: float = 1.0, phase: float = 0.0) -> NDArray[np.float64]:
        angle = np.arange(corners) * 2 * np.pi / corners + phase
        return radius * np.stack([np.sin(angle), -np.cos(angle)], 1)

    if name == "star":
        return np.stack([regular(5), regular(5, 0.42, np.pi / 5)], 1).reshape(-1, 2)
    if name == "heart":
        x = 16 * np.sin(turn) ** 3
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        return np.stack([x / 17, -(y + 2.5) / 16], 1)
    if name == "moon":
        outer = np.linspace(0.18 * np.pi, 1.82 * np.pi, 40)
        far, near = np.cos(outer[0]), np.sin(outer[0])
        inner = np.linspace(-0.5 * np.pi, -1.5 * np.pi, 30)[1:-1]
        bite = np.stack([far + 0.75 * np.cos(inner), near * np.sin(inner)], 1)
        return np.concatenate([np.stack([np.cos(outer), np.sin(outer)], 1), bite])
    if name == "semicircle":
        half = np.linspace(np.pi, 2 * np.pi, 40)
        return np.stack([np.cos(half), np.sin(half) + 0.45], 1)
    if name == "cross":
        arm = [(-0.33, -1), (0.33, -1), (0.33, -0.33)]
        return np.array([(x * c - y * s, x * s + y * c) for c, s in TURNS for x, y in arm])
    if name == "arrow":
        upper = [(-1, -0.3), (0.1, -0.3), (0.1, -0.85), (1, 0)]
        return np.array([*upper, *((x, -y) for x, y in reversed(upper[:-1]))])
    corners = {"circle": 72, "triangle": 3, "square": 4, "pentagon": 5}[name]
    return regular(corners, phase=np.pi / 4 if name == "square" else 0.0)


TURNS = ((1, 0), (0, 1), (-1, 0), (0, -1))  # cosine and sine of the four quarter turns


def _signed_distance(
    corners: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Distance of points (A, A) to a polygon's edge, negative inside (even-odd rule)."""
    point = np.stack([x, y], -1)[:, :, None]  # (A, A, 1, 2)
    start, end = corners, np.roll(corners, -1, 0)
    edge = end - start
    along = ((point - start) * edge).sum(-1) / (edge * edge).sum(-1)
    nearest = start + np.clip(along, 0, 1)[..., None] * edge
    distance = np.sqrt(((point - nearest) ** 2).sum(-1)).min(-1)
    above = (start[:, 1] > point[..., 1]) != (end[:, 1] > point[..., 1])
    rise = np.where(edge[:, 1] == 0, 1.0, edge[:, 1])
    crossing = start[:, 0] + (point[..., 1] - start[:, 1]) / rise * edge[:, 0]
    inside = (above & (point[..., 0] < crossing)).sum(-1) % 2 == 1
    return np.where(inside, -distance, distance)


@functools.cache
def shape_atlas() -> Array:
    """(shapes, 64, 64): signed distance to each outline, in units of the shape's half-width.

    A picture shows [-1.5, 1.5]², so look it up at coordinates divided by 1.5.
    """
    axis = ((np.arange(ATLAS) + 0.5) / ATLAS * 2 - 1) * 1.5
    x, y = np.meshgrid(axis, axis)
    return np.stack([_signed_distance(_outline(name), x, y) for name in SHAPES]).astype(np.float32)


def shape_distance(index: NDArray[np.int64], x: Array, y: Array) -> Array:
    """Signed distances (M, 32, 32) to shapes of half-width 1 centred at the origin."""
    return look_up(shape_atlas(), index, x / 1.5, y / 1.5)


# ---- backgrounds and colours -------------------------------------------------------------------


@functools.cache
def _photo_pyramid() -> tuple[Array, ...]:
    """scikit-learn's two photos at full, half and quarter size, (H, W, 3) in [0, 1]."""
    levels: list[Array] = []
    for name in ("china.jpg", "flower.jpg"):
        photo = load_sample_image(name)[:424].astype(np.float32) / 255
        for _ in range(3):
            levels.append(photo)
            photo = (photo[::2, ::2] + photo[1::2, ::2] + photo[::2, 1::2] + photo[1::2, 1::2]) / 4
    return tuple(levels)


def photo_crops(rng: Rng, count: int) -> Array:
    """Random 32x32 crops of the sample photos at three zooms, half of them mirrored."""
    photos = _photo_pyramid()
    which = rng.integers(len(photos), size=count)
    corner, mirror = rng.random((count, 2)), rng.random(count) < 0.5
    crops = np.empty((count, SIZE, SIZE, 3), np.float32)
    offset = np.arange(SIZE)
    for number, photo in enumerate(photos):
        mine = which == number
        start = (corner[mine] * (np.array(photo.shape[:2]) - SIZE + 1)).astype(np.int64)
        rows, columns = start[:, :1] + offset, start[:, 1:] + offset
        crops[mine] = photo[rows[:, :, None], columns[:, None, :]]
    crops[mirror] = crops[mirror, :, ::-1]
    return crops


def colours(
    rng: Rng,
    count: int,
    *,
    hue: tuple[float, float] = (0.0, 1.0),
    saturation: tuple[float, float] = (0.0, 1.0),
    value: tuple[float, float] = (0.0, 1.0),
) -> Array:
    """Random RGB colours (count, 3) from ranges of hue (in turns, wrapping), saturation, value."""
    columns = [uniform(rng, *bounds, count) for bounds in (hue, saturation, value)]
    columns[0] %= 1.0
    return hsv_to_rgb(np.stack(columns, -1)).astype(np.float32)


def flat(colour: Array) -> Array:
    """Pictures (M, 32, 32, 3) of one colour (M, 3) each."""
    return np.broadcast_to(colour[:, None, None, :], (len(colour), SIZE, SIZE, 3))


def contrasting(rng: Rng, pictures: Array) -> Array:
    """Random colours (M, 3), light over dark pictures and dark over light ones."""
    count = len(pictures)
    light = colours(rng, count, saturation=(0.0, 0.5), value=(0.85, 1.0))
    dark = colours(rng, count, saturation=(0.0, 0.9), value=(0.0, 0.3))
    return np.where(pictures.mean((1, 2, 3))[:, None] < 0.5, light, dark)


def paint(picture: Array, mask: Array, colour: Array) -> Array:
    """The picture with `colour` (M, 3) or another picture (M, 32, 32, 3) laid over it by `mask`."""
    over = flat(colour) if colour.ndim == 2 else colour
    return picture + mask[..., None] * (over - picture)


def smooth_noise(rng: Rng, count: int, cells: int) -> Array:
    """Soft random fields (count, 32, 32) with values in [0, 1] and about `cells` bumps a side."""
    grid = uniform(rng, 0, 1, count, cells + 2, cells + 2)
    x, y = plane(rng, count, pixels=(22.0, 22.0), degrees=0, shift=0)
    return look_up(grid, np.arange(count), x, y)


# ---- patterns ----------------------------------------------------------------------------------


def _soft(wave: Array) -> Array:
    return np.clip(0.5 + 1.5 * wave, 0, 1)


def _cell(x: Array) -> Array:
    """Distance to the nearest whole number, 0 to 0.5."""
    return np.abs(x - np.round(x))


def _bricks(x: Array, y: Array) -> Array:
    row = np.floor(1.2 * y)
    joint = _cell(0.6 * x + 0.5 * (row % 2)) / 0.6
    bed = np.minimum(1.2 * y - row, row + 1 - 1.2 * y) / 1.2
    return np.clip((np.minimum(joint, bed) - 0.04) * 9, 0, 1)


def _crosses(x: Array, y: Array) -> Array:
    u, v = _cell(0.75 * x), _cell(0.75 * y)
    return np.clip((0.14 - np.minimum(u, v)) * 9, 0, 1) * np.clip(
        (0.42 - np.maximum(u, v)) * 9, 0, 1
    )


def _honeycomb(x: Array, y: Array) -> Array:
    tall = np.float32(np.sqrt(3))
    u, v = x - np.round(x), y - tall * np.round(y / tall)
    other_u, other_v = np.abs(u) - 0.5, np.abs(v) - tall / 2
    nearer = np.hypot(u, v) < np.hypot(other_u, other_v)
    u, v = np.abs(np.where(nearer, u, other_u)), np.abs(np.where(nearer, v, other_v))
    return np.clip((np.maximum(u, (u + tall * v) / 2) - 0.38) * 9, 0, 1)


def _turns(x: Array, y: Array) -> Array:
    return np.arctan2(y, x) / (2 * np.pi)


# Each takes coordinates in units of the pattern's period and gives a mask.
PATTERNS: dict[str, Callable[[Array, Array], Array]] = {
    "stripes": lambda x, y: _soft(np.cos(2 * np.pi * x)),
    "checkerboard": lambda x, y: _soft(4 * np.cos(np.pi * x) * np.cos(np.pi * y)),
    "dots": lambda x, y: np.clip((0.32 - np.hypot(x - np.round(x), y - np.round(y))) * 9, 0, 1),
    "bricks": _bricks,
    "waves": lambda x, y: _soft(np.cos(2 * np.pi * (y + 0.45 * np.sin(2 * x)))),
    "rings": lambda x, y: _soft(np.cos(2 * np.pi * np.hypot(x, y))),
    "zigzag": lambda x, y: _soft(np.cos(2 * np.pi * (0.8 * y + 1.1 * _cell(x)))),
    "rays": lambda x, y: _soft(np.cos(2 * np.pi * 8 * _turns(x, y))),
    "grid": lambda x, y: np.clip((0.17 - np.minimum(_cell(x), _cell(y))) * 9, 0, 1),
    "plaid": lambda x, y: (_soft(np.cos(2 * np.pi * x)) + _soft(np.cos(2 * np.pi * y))) / 2,
    "crosses": _crosses,
    "honeycomb": _honeycomb,
}
