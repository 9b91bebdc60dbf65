"""Models by folder, or by Hugging Face id: from the cache, or fetched into it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from .._checks import raise_all
from .adapters import adapted
from .checkpoint import Checkpoint, open_checkpoint
from .recipe import ModelRef

# What a merge may need of a repository: no other framework's weights.
_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "tokenizer*")
_PICKLES = ("pytorch_model*.bin", "adapter_model.bin")  # where there are no safetensors


def open_models(models: Sequence[ModelRef], base: Path) -> Mapping[ModelRef, Checkpoint]:
    """The headers of all models, with their adapters on them.

    Args:
        base: relative folders are relative to it, or, as in mergekit, to the working directory.

    Raises:
        ValueError: models that cannot be had, or are broken; all of them.
    """
    found, faults = {}, []
    for model in models:
        try:
            checkpoint = open_checkpoint(folder_of(replace(model, lora=None), base))
            if model.lora is not None:
                checkpoint = adapted(checkpoint, folder_of(model.lora, base), str(model))
            found[model] = checkpoint
        except (OSError, ValueError) as error:
            faults.append(str(error))
    raise_all("merge", dict.fromkeys(faults))
    return found


def folder_of(model: ModelRef, base: Path) -> Path:
    """Where a model lies; fetched from Hugging Face if it is no folder here.

    Raises:
        ValueError: neither a folder nor an id whose files can be had.
    """
    for path in (base / Path(model.path).expanduser(), Path(model.path).expanduser()):
        if path.exists():
            if model.revision is not None:
                raise ValueError(f"{model}: {path} is a folder here, which has no revisions")
            return path
    if model.path.count("/") > 1 or model.path.startswith((".", "/", "~")):
        raise ValueError(f"{model}: no such folder")
    folder = _fetched(model, _PATTERNS)
    if not any(folder.glob("*.safetensors")):
        folder = _fetched(model, _PICKLES)
    return folder


def _fetched(model: ModelRef, patterns: Iterable[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            model.path, revision=model.revision, allow_patterns=list(patterns)
        )
    except HFValidationError as error:
        raise ValueError(f"{model}: no folder here, and no id of Hugging Face's") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        offline = " (offline: HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ValueError(
            f"{model}: no folder here, and not to be had from Hugging Face{offline}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return Path(folder)
