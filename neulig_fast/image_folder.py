"""Data sets that are folders: one sub-folder of images per class, read in one fixed order."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ._checks import did_you_mean

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# What PIL raises on files that are no image, or a damaged one.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, Image.DecompressionBombError)
_NAMED = 5  # at most so many files by name in one message
Transform = Callable[[Image.Image], Tensor]


class UnreadableImage(ValueError):
    """An image file that cannot be decoded; the message names it."""


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """The images below ``root``: classes sorted by name, files sorted by path within a class.

    ``labels[k]`` is the index in ``classes`` of ``files[k]``'s class. ``ignored`` counts files
    that are no images: another suffix, hidden, or outside every class folder.
    """

    root: Path
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]
    ignored: int

    def __len__(self) -> int:
        return len(self.files)


def scan(root: str | Path) -> ImageFolder:
    """List ``root``'s class sub-folders and the images in them, at any depth.

    Images are known by suffix, in any case; hidden files and folders do not count.

    Raises:
        ValueError: no class sub-folders, or some without an image, all of them named.
    """
    root = Path(root)
    classes = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not classes:
        raise ValueError(f"{root} has no sub-folders; expected one per class, with its images")
    ignored = sum(1 for p in root.iterdir() if p.is_file())
    files: list[Path] = []
    labels: list[int] = []
    empty = []
    for label, name in enumerate(classes):
        found, other = _images_in(root / name)
        if not found:
            empty.append(name)
        files += found
        labels += [label] * len(found)
        ignored += other
    if empty:
        raise ValueError(f"{root}: class folders without images: {', '.join(empty)}")
    return ImageFolder(root, tuple(classes), tuple(files), tuple(labels), ignored)


def _images_in(folder: Path) -> tuple[list[Path], int]:
    found, ignored = [], 0
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name.startswith(".") or Path(name).suffix.lower() not in SUFFIXES:
                ignored += 1
            else:
                found.append(Path(place, name))
    return sorted(found), ignored


def gather(root: str | Path, seed: int) -> ImageFolder:
    """All images below ``root``, at any depth and unlabelled: one class without a name.

    Their order is drawn by a hash of seed and path: the first k are a sample, and so is a batch.

    Raises:
        ValueError: there are none.
    """
    root = Path(root)
    files, ignored = _images_in(root)
    if not files:
        raise ValueError(f"{root}: no images ({', '.join(SUFFIXES)}) at any depth")
    files.sort(key=lambda path: _drawn(root, path, seed))
    return ImageFolder(root, ("",), tuple(files), (0,) * len(files), ignored)


def difference(split: ImageFolder, train: ImageFolder) -> str | None:
    """How the class folders of ``split`` differ from those of ``train``, or None."""
    lacks = [name for name in train.classes if name not in split.classes]
    extra = [name for name in split.classes if name not in train.classes]
    found = [f"lacks {', '.join(lacks)}"] if lacks else []
    found += [f"has {', '.join(extra)} besides"] if extra else []
    if not found:
        return None
    return f"{split.root} differs in its class folders from {train.root}: {'; '.join(found)}"


def split(folder: ImageFolder, fraction: float, seed: int) -> tuple[ImageFolder, ImageFolder]:
    """Set aside ``fraction`` of the images, drawn by a hash of seed and path, at least one.

    Returns:
        The rest and what was set aside, each in the folder's order.

    Raises:
        ValueError: nothing would be left.
    """
    aside = max(1, round(fraction * len(folder)))
    if aside >= len(folder):
        raise ValueError(
            f"{folder.root} has {len(folder)} images, too few to set {fraction:g} of them aside"
        )
    order = sorted(range(len(folder)), key=lambda k: _drawn(folder.root, folder.files[k], seed))
    return subset(folder, sorted(order[aside:])), subset(folder, sorted(order[:aside]))


def _drawn(root: Path, path: Path, seed: int) -> bytes:
    """A random number of the image that neither its place on the disk nor other images change."""
    text = f"{seed}/{path.relative_to(root).as_posix()}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def subset(folder: ImageFolder, indices: Sequence[int]) -> ImageFolder:
    """The images at ``indices``, in that order."""
    return dataclasses.replace(
        folder,
        files=tuple(folder.files[index] for index in indices),
        labels=tuple(folder.labels[index] for index in indices),
    )


def unreadable(folder: ImageFolder) -> str | None:
    """Open every file as far as its header; what cannot be, by name, or None."""
    faults = []
    for path in folder.files:
        try:
            with Image.open(path):
                pass
        except _DAMAGE as error:
            faults.append(_about(path, error))
    more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
    return "; ".join(faults[:_NAMED]) + more if faults else None


def _about(path: Path, error: Exception) -> str:
    reason = str(error).replace(f"'{path}'", "").replace(str(path), "").strip()
    return f"{path} is not a readable image ({reason or type(error).__name__})"


def named(classes: Sequence[str], names: Mapping[str, str] | Sequence[str] | None) -> list[str]:
    """Class names for prompts, in the order of ``classes`` (folder names).

    Args:
        names: folder -> name, for some or all folders; or one name per folder in sorted order; or
            None. A folder without a name is called by its own, underscores as spaces.

    Raises:
        ValueError: unknown folders, a list of another length, or a list for folders whose order is
            not obvious (2 before 10, or after it?).
    """
    if names is None or isinstance(names, Mapping):
        wrong = [name for name in names or () if name not in classes]
        if wrong:
            hints = ", ".join(f"{name!r}{did_you_mean(name, classes)}" for name in wrong)
            raise ValueError(f"no such class folder: {hints}")
        return [(names or {}).get(name, name.replace("_", " ")) for name in classes]
    if len(names) != len(classes):
        raise ValueError(f"{len(names)} names for {len(classes)} class folders")
    if all(name.isdecimal() for name in classes) and sorted(classes, key=int) != list(classes):
        raise ValueError(
            f"a list is ambiguous for the folders {', '.join(classes)}, which sort differently as "
            "text and as numbers: give a mapping, folder: name"
        )
    return list(names)


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images of a folder, decoded and transformed; item k is (tensor, label).

    Args:
        transform: from a PIL image. Used for view 0.
        augment: a random transform for views 1, 2, ...; its draws depend on (seed, view, item)
            only, so neither on workers nor on what was read before.
    """

    def __init__(
        self,
        folder: ImageFolder,
        transform: Transform,
        augment: Transform | None = None,
        seed: int = 0,
    ) -> None:
        self.folder, self.transform, self.augment, self.seed = folder, transform, augment, seed
        self.view = 0

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Raises UnreadableImage naming the file."""
        image = _decoded(self.folder.files[index])
        return self._transformed(image, index), self.folder.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """A batch, or the one exception it met: raised in a worker it would drag a traceback."""
        try:
            return [self[index] for index in indices]
        except UnreadableImage as error:
            return [error]

    def _transformed(self, image: Image.Image, index: int) -> Tensor:
        if self.view == 0 or self.augment is None:
            return self.transform(image)
        text = f"{self.seed}/{self.view}/{index}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self.augment(image)


def _decoded(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except _DAMAGE as error:
        raise UnreadableImage(_about(path, error)) from error


class ImageLoader:
    """Batches (images (B, 3, H, W), labels (B,) int64) of a data set in its order, re-iterable.

    The first batch is read in the main process: a look at it starts no workers.

    Args:
        views: with an augmenting data set, pass k over the loader yields view k mod ``views``.

    Raises:
        UnreadableImage: from the iterator, naming the file.
    """

    def __init__(
        self, dataset: ImageDataset, batch_size: int, workers: int = 0, views: int = 1
    ) -> None:
        self.dataset, self.views, self._passes = dataset, views, 0
        self._first = range(min(batch_size, len(dataset)))
        self._later = DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=range(batch_size, len(dataset)),
            num_workers=workers,
            collate_fn=_collate,
            generator=torch.Generator(),  # or every pass would draw from the global one
        )

    def __len__(self) -> int:
        return bool(self._first) + len(self._later)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.dataset.view = self._passes % self.views
        self._passes += 1
        first = [self.dataset.__getitems__(self._first)] if self._first else []
        for batch in chain(map(_collate, first), self._later):
            if isinstance(batch, UnreadableImage):
                raise batch
            yield batch


def _collate(items: list[Any]) -> Any:
    return items[0] if isinstance(items[0], UnreadableImage) else tuple(default_collate(items))
