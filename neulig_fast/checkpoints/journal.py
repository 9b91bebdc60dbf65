"""Journals: a line of JSON for everything that is complete, read after a crash."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_NAMED = {"xxh3": "the recipe"}  # what a key of an identity is to people


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a journal, none if there is no file. Crashes may have cut some of them."""
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            yield content


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """In what two identities differ, in words."""
    for key in {*old, *new}:
        if old.get(key) != new.get(key):
            yield _NAMED.get(key, key)
