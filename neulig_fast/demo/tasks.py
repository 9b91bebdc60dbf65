"""The demo's five image tasks, drawn on the spot: digits, letters, shapes, textures, colours.

The handwriting is scikit-learn's `load_digits`, the backgrounds crops of its two sample photos,
the letters set in the fonts that matplotlib ships. Each task comes in two styles: "plain" (light
figures on dark or coloured flat ground, for pre-training) and "domain" (the task's own look, for
fine-tuning and testing), so that an expert has something to learn that the origin does not know.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from . import drawing, pictures
from .drawing import Array, Rng

SPLITS = ("train", "validation", "test")
STYLES = ("plain", "domain")
MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's CLIP statistics, open_clip's default
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class TaskData:
    """Images and labels of one task: `images` (M, 3, 32, 32) uint8, `labels` (M,) int64."""

    name: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    templates: tuple[str, ...]


@dataclass(frozen=True)
class _Task:
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    draw: Callable[[Rng, NDArray[np.int64], str, str], Array]  # rng, labels, split, style


_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TASKS = {
    "digits": _Task(
        _DIGITS,
        ("the digit {}.", "a handwritten {}.", "a scan of the number {}.", "the number {}."),
        pictures.draw_digits,
    ),
    "letters": _Task(
        tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
        ("the letter {}.", "a capital {}.", "a sign with the letter {}.", "the printed letter {}."),
        pictures.draw_letters,
    ),
    "shapes": _Task(
        drawing.SHAPES,
        ("a drawing of a {}.", "the outline of a {}.", "a sketch of a {}.", "the shape of a {}."),
        pictures.draw_shapes,
    ),
    "textures": _Task(
        tuple(drawing.PATTERNS),
        ("a pattern of {}.", "a {} texture.", "a surface with {}.", "a wall with {}."),
        pictures.draw_textures,
    ),
    "colours": _Task(
        tuple(pictures.COLOURS),
        ("a {} thing.", "something {}.", "an object painted {}.", "the colour {}."),
        pictures.draw_colours,
    ),
}
TASK_NAMES = tuple(_TASKS)


def make_task(
    name: str, *, split: str = "train", style: str = "domain", size: int = 500, seed: int = 0
) -> TaskData:
    """Draw `size` images of one task, its classes as even as can be, in random order.

    The same arguments give the same images in every process; another split, style or seed gives
    unrelated ones, and the digits of two splits never come from the same scan.

    Raises:
        ValueError: an unknown name, split or style, or a negative size or seed; all at once.
    """
    allowed = (("name", name, TASK_NAMES), ("split", split, SPLITS), ("style", style, STYLES))
    wrong = [
        f"{argument} must be one of {', '.join(values)}, got {given!r}"
        for argument, given, values in allowed
        if given not in values
    ]
    for argument, number in (("size", size), ("seed", seed)):
        if number < 0:
            wrong.append(f"{argument} must not be negative, got {number}")
    if wrong:
        raise ValueError("make_task: " + "; ".join(wrong))
    task = _TASKS[name]
    key = (seed, TASK_NAMES.index(name), SPLITS.index(split), STYLES.index(style))
    rng = np.random.default_rng(np.random.SeedSequence(key))
    labels = rng.permutation(np.arange(size, dtype=np.int64) % len(task.class_names))
    pictures = task.draw(rng, labels, split, style)
    pixels = np.rint(np.clip(pictures, 0, 1) * 255).astype(np.uint8).transpose(0, 3, 1, 2)
    images = torch.from_numpy(np.ascontiguousarray(pixels))
    return TaskData(name, images, torch.from_numpy(labels), task.class_names, task.templates)


def normalise(images: Tensor) -> Tensor:
    """uint8 images (M, 3, 32, 32) as the model's float32 input: open_clip's transform, same bits.

    Raises:
        TypeError: the images are not uint8 (they may be normalised already).
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"normalise: images must be uint8, got {images.dtype}")
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return images.float().div_(255).sub_(mean).div_(std)


def _fitting(words: str, width: int) -> ImageFont.FreeTypeFont:
    """The largest font, up to 11 pixels, in which words are not wider than ``width``."""
    name = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
    fonts = (ImageFont.truetype(name, size) for size in range(11, 4, -1))
    return next(font for font in fonts if font.getlength(words) <= width or font.size == 5)


def contact_sheet(tasks: Sequence[TaskData], path: str | Path, columns: int = 26) -> None:
    """Write a PNG with one labelled strip per task, as many examples of each class as fit."""
    cell, caption = 2 * drawing.SIZE + 4, 14
    height = len(tasks) * (2 * (cell + caption) + caption)
    sheet = Image.new("RGB", (columns * cell, height), "white")
    pen = ImageDraw.Draw(sheet)
    top = 0
    for task in tasks:
        words = f"{task.name} ({len(task.images)} images)"
        pen.text((2, top), words, fill="black", font=_fitting(words, columns * cell))
        # By class in turn: the first image of each class, then the second of each, and so on.
        turn = torch.zeros_like(task.labels)
        for label in range(len(task.class_names)):
            mine = task.labels == label
            turn[mine] = torch.arange(int(mine.sum()))
        order = torch.argsort(turn * len(task.class_names) + task.labels)[: 2 * columns]
        for place, number in enumerate(order.tolist()):
            row, column = divmod(place, columns)
            corner = (column * cell, top + caption + row * (cell + caption))
            tile = Image.fromarray(task.images[number].permute(1, 2, 0).contiguous().numpy())
            sheet.paste(tile.resize((cell - 4, cell - 4), Image.Resampling.NEAREST), corner)
            words = task.class_names[int(task.labels[number])]
            below = (corner[0], corner[1] + cell - 4)
            pen.text(below, words, fill="black", font=_fitting(words, cell - 4))
        top += 2 * (cell + caption) + caption
    sheet.save(path)
