"""Numbers of bytes as people write them: ``5G``, ``512M``, ``2 GiB``."""

from __future__ import annotations

import re

_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_END = 1 << 63
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", re.IGNORECASE)


def parse(name: str, size: int | str) -> int:
    """Bytes; K, M, G and T are powers of 1024.

    Raises:
        ValueError: no number of bytes, or none at all.
    """
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found and (number := float(found[1]) * _FACTORS[found[2].lower()]) < _END:
        size = int(number)
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size < _END:
        raise ValueError(f"{name} must be bytes, or such as 512M or 5G, got {size!r}")
    return size


def text(size: int) -> str:
    """``1.4 GiB``."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= factor:
            number = f"{size / factor:.3g}"
            return f"{number if 'e' not in number else round(size / factor)} {unit}"
    return f"{size} bytes"
