"""The file of an unfinished fit: safetensors, with settings and progress as JSON in its header."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from .._checks import raise_all
from .._registry import NeuligFastWarning
from ..state_files import write_safetensors

_FORMAT = "neulig_fast.fit.1"


class Checkpoint:
    """Where a fit saves itself.

    Args:
        path: of the file; need not exist. In an existing folder every fit gets a file of its own,
            named after its settings.
        settings: JSON values that determine the fit to the bit, data included (as hashes).
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path, text = Path(path), json.dumps(settings)
        self.settings = json.loads(text)
        if self.path.is_dir():
            name = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
            self.path /= f"fit-{name}.safetensors"

    def write(self, tensors: Mapping[str, Tensor], progress: Mapping[str, float]) -> None:
        """Replace the file; the old one stays whole until the new one is.

        A disk that is full must not end a fit that runs: it only gets a ``NeuligFastWarning``.
        """
        metadata = {
            "format": _FORMAT,
            "settings": json.dumps(self.settings),
            "progress": json.dumps(progress),
        }
        try:
            write_safetensors(self.path, tensors, metadata)
        except OSError as error:
            text = f"checkpoint: {error}; the fit goes on, but could not be resumed from here"
            warnings.warn(text, NeuligFastWarning, stacklevel=2)

    def read(self) -> tuple[dict[str, Tensor], dict[str, float]] | None:
        """Tensors and progress; None when there is no file yet.

        Raises:
            ValueError: not such a file, damaged, or of a fit with other settings, each difference
                listed.
        """
        if not self.path.exists():
            return None
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"checkpoint {self.path} cannot be read: {error}") from error
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"checkpoint {self.path} is not the checkpoint of a fit")
        saved = json.loads(metadata["settings"])
        subject = f"checkpoint {self.path} belongs to another fit (delete it to start anew)"
        raise_all(subject, _differences(saved, self.settings))
        return tensors, json.loads(metadata["progress"])


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted(saved.keys() | now.keys()):
        if saved.get(key) != now.get(key):
            yield f"{key} was {saved.get(key)!r}, is {now.get(key)!r}"
