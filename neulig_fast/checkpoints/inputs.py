"""Whether the files of models are as they were written, where somebody noted their checksums.

Files of weights have none of their own. An earlier merge's manifest has one of every tensor;
Hugging Face's cache keeps a large file under its SHA-256, and beside a download into a folder of
one's own (``--local-dir``) it is noted too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from .._checks import listed, raise_all
from .checkpoint import Checkpoint
from .counter import Counter
from .manifest import MANIFEST, Manifest, differences

_SHA256 = re.compile(r"[0-9a-f]{64}")
_NOTES = ".cache/huggingface/download"  # below such a folder
_READ_BYTES = 16 << 20


def check(
    models: Iterable[Checkpoint], progress: Callable[[int, int], Any] | None = None
) -> list[str]:
    """Read all that has a checksum and compare.

    Args:
        progress: told of bytes read and of all bytes.

    Returns:
        Which files have none, in words.

    Raises:
        ValueError: everything that differs.
    """
    files = sorted({file for model in models for file in model.files})
    merged = {folder: Manifest.find(folder) for folder in {file.parent for file in files}}
    merges = {folder: found for folder, found in merged.items() if found is not None}
    listed_in = {folder / name for folder, found in merges.items() for name in found.files}
    sums = {file: _noted(file) for file in files if file not in listed_in}
    known = {file: text for file, text in sums.items() if text is not None}
    total = sum(found.bytes for found in merges.values())
    total += sum(file.stat().st_size for file in known)
    advance = Counter(total, progress)

    def faults() -> Iterator[str]:
        for folder, manifest in merges.items():
            for text in differences(folder, manifest, advance):
                yield f"{folder}: {text}, says {MANIFEST}"
        for file, wanted in known.items():
            if _sha256(file, advance) != wanted:
                yield f"{file}: differs from what was downloaded"

    raise_all("merge", list(faults()))
    unknown = [str(file) for file in sums if file not in known]
    return [f"inputs without checksums were not checked: {listed(unknown)}"] if unknown else []


def _noted(file: Path) -> str | None:
    """The SHA-256 that Hugging Face's client has noted of a file; small ones have another sum."""
    blob = file.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    note = file.parent / _NOTES / f"{file.name}.metadata"
    lines = note.read_text("utf-8", "replace").splitlines() if note.is_file() else []
    return lines[1] if len(lines) > 1 and _SHA256.fullmatch(lines[1]) else None


def _sha256(path: Path, advance: Callable[[int], Any]) -> str:
    found = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            found.update(data)
            advance(len(data))
    return found.hexdigest()
