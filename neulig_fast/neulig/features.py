"""The experts' features, each image through each frozen expert once.

The cache is addressed by content. An image's key is a hash of the *transformed* tensor: its bytes,
dtype and shape. The cache as a whole belongs to one identity: the pool's fingerprint (weights) and
a description of the encoder. So weights, data and transform are all in the key, while order,
batch size and split are not; the same image in two data sets is computed once.

With a folder, rows are also kept in ``folder/<identity>/<content hash>.safetensors``, written
whole or not at all and checked when read. What an encoder's code does is not in its identity, so
one image of every file is computed again when the file is first used, and has to agree.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._checks import raise_all, shape
from ..encoders import Replay, expert_forward, faults
from .batches import unpack
from .content import KEY_BYTES, image_keys, pool_identity
from .feature_files import read_shards, stale_faults, write_shard

if TYPE_CHECKING:
    from ..pool import ExpertPool

_FLUSH_BYTES = 64 * 2**20  # of new rows, before collect() writes a file


class Collected(NamedTuple):
    """Rows of one data set in the loader's order: view 0 of every image, then view 1, …

    ``features`` (V·M, N, D); ``labels`` (V·M,) int64 on the same device, None without labels;
    ``keys`` (V·M, 16) uint8 on the CPU, the images' content hashes; ``views`` V.
    """

    features: Tensor
    labels: Tensor | None
    keys: Tensor
    views: int = 1


class FeatureCache:
    """Features of a pool's experts, computed on first sight.

    Args:
        pool: an ``ExpertPool`` with a template.
        folder: where to keep features between runs; None keeps them in memory only.
        widths: the D that each task's head expects; checked against the first features.
    """

    def __init__(
        self,
        pool: ExpertPool,
        folder: str | Path | None = None,
        widths: Mapping[str, int] | None = None,
    ) -> None:
        self.pool, self.widths = pool, dict(widths or {})
        self.folder = None if folder is None else Path(folder) / pool_identity(pool)
        self.computed = 0  # images whose features were not there
        self._encode = Replay(pool, expert_forward)
        self._forget()
        if self.folder is not None:
            self._read_folder(self.folder)

    def __len__(self) -> int:
        return len(self._row_of)

    def features(self, images: Tensor, *, store: bool = True) -> Tensor:
        """Features (B, N, D) of images (B, ...), on the pool's device, without gradient.

        Only images that are not in the cache run, duplicates within the batch once.

        Args:
            store: keep what is new. A service that sees ever new images would fill the memory.

        Raises:
            ValueError: no images; no template; a feature that is not finite, its expert named;
                a folder whose features are another encoder's.
        """
        if store:
            return self._gather(self._look_up(images))
        keys, new, block = self._missing(images)
        at = {key: k for k, key in enumerate(new)}
        rows = [block[at[key]] if key in at else self._rows[self._row_of[key]] for key in keys]
        return torch.stack(rows)

    def clear(self) -> None:
        """Free the memory. What a folder holds stays there, unread until the next cache."""
        self.flush()
        self._forget()
        self._encode.clear()

    def collect(
        self,
        loader: Iterable[Any],
        *,
        name: str = "loader",
        num_classes: int | None = None,
        views: int = 1,
        advance: Callable[[], None] | None = None,
    ) -> Collected:
        """Features and labels of a whole loader.

        Args:
            loader: yields (images, labels); bare batches of images when ``num_classes`` is None.
            name: of the data set, for messages.
            num_classes: labels must lie in [0, num_classes). None: labels are not used.
            views: passes over the loader, for loaders that augment at random.
            advance: called after every batch.

        Raises:
            ValueError, TypeError: an empty loader, a batch that is not (images, labels), labels
                out of range, passes of different length, features that are not finite.
        """
        rows: list[int] = []
        labels: list[Tensor] = []
        lengths = []
        try:
            for _ in range(views):
                before = len(rows)
                for k, batch in enumerate(loader):
                    images, target = unpack(batch, num_classes, f"{name}: batch {k}")
                    rows += self._look_up(images)
                    if target is not None:
                        labels.append(target)
                    if self._pending_bytes() >= _FLUSH_BYTES:
                        self.flush()
                    if advance is not None:
                        advance()
                lengths.append(len(rows) - before)
        finally:
            self.flush()  # what is done stays done, also when interrupted
        raise_all(name, _length_faults(lengths))
        known = list(self._row_of)  # in row order
        keys = torch.frombuffer(bytearray(b"".join(known[r] for r in rows)), dtype=torch.uint8)
        features = self._gather(rows)
        target = torch.cat(labels).to(features.device) if labels else None
        return Collected(features, target, keys.view(-1, KEY_BYTES), views)

    # -- rows ----------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._row_of: dict[bytes, int] = {}
        self._rows = torch.empty(0)  # then (capacity, N, D)
        self._flushed = 0
        self._ends: list[int] = []  # file k holds the rows from the end of file k - 1 to its own
        self._unproven: set[int] = set()  # files

    def _look_up(self, images: Tensor) -> list[int]:
        keys, new, block = self._missing(images)
        if new:
            self._append(new, block)
        return [self._row_of[key] for key in keys]

    def _missing(self, images: Tensor) -> tuple[list[bytes], list[bytes], Tensor]:
        """The images' keys, those that have no row, and the latter's features."""
        if not isinstance(images, Tensor) or images.ndim < 2 or not images.numel():
            got = shape(images) if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(f"features: images must be a non-empty batch (B, ...), got {got}")
        keys = image_keys(images)
        self._prove(images, keys)
        new = {key: b for b, key in enumerate(keys) if key not in self._row_of}
        if not new:
            return keys, [], self._rows[:0]
        block = self._compute(images[torch.tensor(list(new.values()), device=images.device)])
        self.computed += len(new)
        return keys, list(new), block

    def _prove(self, images: Tensor, keys: list[bytes]) -> None:
        """Compute one image of every file that is used for the first time, and compare."""
        found = {}
        for b, key in enumerate(keys if self._unproven else ()):
            file = bisect_right(self._ends, self._row_of.get(key, len(self)))
            if file in self._unproven:
                found[file] = b
        if found:
            at = list(found.values())
            computed = self._compute(images[torch.tensor(at, device=images.device)])
            stored = self._gather([self._row_of[keys[b]] for b in at])
            raise_all(f"features: {self.folder}", stale_faults(stored, computed, self.pool.names))
            self._unproven -= found.keys()

    @torch.no_grad()
    def _compute(self, images: Tensor) -> Tensor:
        template = self.pool.template
        if template is None:
            raise ValueError(
                "features: the pool has no template module to run; give ExpertPool or "
                "NeuLig.load a template="
            )
        if hasattr(template, "encode_image"):
            raise ValueError(
                "features: the experts are whole CLIP models, whose forward returns normalised "
                "image features and text features; make experts of the image tower (.visual)"
            )
        if faults(template):
            block = expert_forward(self.pool, images, fallback="torch.func")
        else:
            # All experts run at once: on so many images that they hold as many activations together
            # as one of them would on the whole batch.
            size = -(-len(images) // self.pool.num_experts)
            block = torch.cat([self._encode(some) for some in images.split(size)], 1)
        features = block.transpose(0, 1)
        finite = features.isfinite().all(2)
        raise_all("features", _finite_faults(finite, self.pool.names))
        raise_all("features", _width_faults(self.widths, features.shape[2]))
        return features

    @torch.inference_mode(False)  # else rows of a cache begun in it could not be added to outside
    def _append(self, keys: list[bytes], block: Tensor) -> None:
        count = len(self)
        if self._rows.ndim == 1:
            self._rows = block.new_empty((0, *block.shape[1:]))
        if block.shape[1:] != self._rows.shape[1:] or block.dtype != self._rows.dtype:
            raise ValueError(
                f"features: the cache holds rows {shape(self._rows[0])} {self._rows.dtype}, "
                f"got {shape(block[0])} {block.dtype}"
            )
        if count + len(keys) > len(self._rows):
            grown = block.new_empty((max(2 * count, count + len(keys)), *block.shape[1:]))
            grown[:count] = self._rows[:count]
            self._rows = grown
        self._rows[count : count + len(keys)] = block
        self._row_of.update({key: count + k for k, key in enumerate(keys)})

    def _gather(self, rows: list[int]) -> Tensor:
        return self._rows[torch.tensor(rows, device=self._rows.device)]

    # -- the folder ----------------------------------------------------------------------------

    def _pending_bytes(self) -> int:
        pending = 0 if self.folder is None else len(self) - self._flushed
        return self._rows[:pending].nbytes

    def flush(self) -> None:
        """Write the rows that the folder does not have yet; nothing without a folder."""
        if self.folder is not None and self._flushed < len(self):
            keys = list(self._row_of)[self._flushed :]
            write_shard(self.folder, keys, self._rows[self._flushed : len(self)])
            self._flushed = len(self)

    def _read_folder(self, folder: Path) -> None:
        for keys, features in read_shards(folder):
            new = [k for k, key in enumerate(keys) if key not in self._row_of]
            if new:
                block = features[torch.tensor(new)].to(self.pool.params.device)
                self._append([keys[k] for k in new], block)
                self._unproven.add(len(self._ends))
                self._ends.append(len(self))
        self._flushed = len(self)


def _length_faults(lengths: list[int]) -> Iterator[str]:
    if lengths[0] == 0:
        yield "the loader is empty"
    if len(set(lengths)) > 1:
        yield (
            f"every view must be one pass over the same images, got passes of {lengths} "
            "(a loader that can be read only once?)"
        )


def _width_faults(widths: Mapping[str, int], width: int) -> Iterator[str]:
    for task, expected in widths.items():
        if expected != width:
            yield f"the head of task {task!r} is for D = {expected}, the experts give D = {width}"


def _finite_faults(finite: Tensor, names: Iterable[str]) -> Iterator[str]:
    for i, name in enumerate(names):
        bad = int((~finite[:, i]).sum())
        if bad:
            yield f"expert {name!r} gives non-finite features for {bad} of {len(finite)} images"
