"""What a finished merge says of itself: what it was made from, and a checksum of all its bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from .._checks import listed, raise_all
from .counter import Counter
from .headers import read_header

MANIFEST = "merge_manifest.json"
_OWN = "xxh3"  # in the file: a checksum of the rest of it
_READ_BYTES = 16 << 20
_LOADED = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


@dataclass(frozen=True)
class Manifest:
    """The file ``merge_manifest.json`` of a merged checkpoint.

    Attributes:
        version: of the program.
        recipe: method, models, parameters: what the merge was made from.
        files: name -> ``bytes`` and ``xxh3``, the XXH3-128 of its bytes, or of the header alone
            for a file of tensors.
        tensors: name -> ``file`` and ``xxh3`` of its bytes.
    """

    version: str
    recipe: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, Mapping[str, str]]

    @classmethod
    def find(cls, folder: Path) -> Manifest | None:
        """That of a folder; None without one.

        Raises:
            ValueError: one that no merge wrote.
        """
        path = folder / MANIFEST
        if not path.exists():
            return None
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text)
            own = content.pop(_OWN, None)
            found = cls(**content)
            sizes = [entry["bytes"] for entry in found.files.values()]
            texts = [entry["xxh3"] for entry in [*found.files.values(), *found.tensors.values()]]
            texts += [entry["file"] for entry in found.tensors.values()]
            inside = all(Path(name).name == name for name in found.files)
            right = inside and all(type(size) is int for size in sizes)
            right = right and all(isinstance(text, str) for text in texts)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: no merge wrote this ({error})") from error
        if not right:
            raise ValueError(f"{path}: no merge wrote this")
        if own is not None and text != found.text():
            raise ValueError(f"{path}: differs from its own checksum")
        return found

    def text(self) -> str:
        """The file's content, with a checksum of itself."""
        return _as_text({**asdict(self), _OWN: self._own()})

    def _own(self) -> str:
        return checksum(_as_text(asdict(self)).encode())

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(entry["bytes"] for entry in self.files.values())


def _as_text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def verify(folder: Path, progress: Callable[[int, int], Any] | None = None) -> Manifest:
    """Read a merged checkpoint and compare every byte's checksum with its manifest.

    Args:
        folder: of the checkpoint.
        progress: told of bytes read and of all bytes.

    Raises:
        FileNotFoundError: no such folder; no manifest: it is not a merge, or one that did not end.
        ValueError: everything that differs.
    """
    manifest = Manifest.find(folder)
    if manifest is None:
        raise FileNotFoundError(f"{folder}: {_why_none(folder)}")
    raise_all(str(folder), differences(folder, manifest, Counter(manifest.bytes, progress)))
    return manifest


def _why_none(folder: Path) -> str:
    if not folder.is_dir():
        return "is a file, not a folder" if folder.exists() else "no such folder"
    below = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
    if below:
        return f"has no {MANIFEST}, its folders {listed(below)} have: verify them one by one"
    return f"has no {MANIFEST}: not a merge, or an unfinished one"


def differences(folder: Path, manifest: Manifest, advance: Callable[[int], Any]) -> Iterator[str]:
    """What of a merge is not as its manifest says, in words."""
    where = {}
    for name, wanted in manifest.files.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
            continue
        size = path.stat().st_size
        if size != wanted["bytes"]:
            yield f"{name} has {size} bytes, not {wanted['bytes']}"
            continue
        length = size
        if name.endswith(".safetensors"):
            try:
                entries = read_header(path).entries
            except ValueError as error:
                yield str(error)
                continue
            length = entries[0].start if entries else size
            where.update({entry.name: entry for entry in entries})
        if _checksum(path, 0, length, advance) != wanted["xxh3"]:
            yield f"{name} differs" + (" in its header" if length < size else "")
    for name, wanted in manifest.tensors.items():
        entry = where.get(name)
        if entry is not None:
            found = _checksum(entry.file, entry.start, entry.stop, advance)
            if found != wanted["xxh3"]:
                yield f"{name!r} in {entry.file.name} differs"
        elif (folder / wanted["file"]).is_file():
            yield f"{name!r} is missing"
    yield from (f"{name!r} is not of this merge" for name in where if name not in manifest.tensors)
    loaded = {path.name for pattern in _LOADED for path in folder.glob(pattern)}
    yield from (f"{name} is not of this merge" for name in sorted(loaded - {*manifest.files}))


def _checksum(path: Path, start: int, stop: int, advance: Callable[[int], Any]) -> str:
    found = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < stop:
            data = file.read(min(_READ_BYTES, stop - start))
            if not data:
                break
            found.update(data)
            start += len(data)
            advance(len(data))
    return found.hexdigest()


def checksum(data: bytes) -> str:
    """XXH3-128 of some bytes."""
    return xxhash.xxh3_128_hexdigest(data)
