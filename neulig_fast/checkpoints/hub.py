"""Models by folder, or by Hugging Face id: from the cache, or fetched into it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from .adapters import adapted
from .checkpoint import Checkpoint, open_checkpoint
from .recipe import ModelRef

# What a merge may need of a repository: no other framework's weights.
_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "tokenizer*")
_PICKLES = ("pytorch_model*.bin", "adapter_model.bin")  # where there are no safetensors
_MODEL = ("config.json", "*.safetensors", *_PICKLES)  # any of them makes a folder one


def find_models(
    models: Iterable[ModelRef], base: Path
) -> tuple[Mapping[ModelRef, Checkpoint], list[str]]:
    """The headers of all models, with their adapters on them; which cannot be had or are broken.

    Args:
        base: relative folders are relative to it, or, as in mergekit, to the working directory.
    """
    found: dict[ModelRef, Checkpoint] = {}
    faults = []
    for model in models:
        try:
            checkpoint = open_checkpoint(folder_of(replace(model, lora=None), base))
            if model.lora is not None:
                checkpoint = adapted(checkpoint, folder_of(model.lora, base), str(model))
            found[model] = checkpoint
        except (OSError, ValueError) as error:
            faults.append(str(error))
    return found, list(dict.fromkeys(faults))


def absent(models: Iterable[ModelRef], base: Path) -> list[str]:
    """Which folders are missing, without asking Hugging Face: an id is none of them unless its
    first half is a model here; a folder of that name may be where the owner's models lie."""
    found = []
    for model in models:
        for part in (model, *([model.lora] if model.lora is not None else [])):
            path = Path(part.path).expanduser()
            near = [base / path, path]
            inside = len(path.parts) > 1 and any(_is_model(place.parent) for place in near)
            if not any(place.exists() for place in near) and (inside or _is_no_id(part)):
                found.append(f"{part}: no such folder")
    return list(dict.fromkeys(found))


def _is_model(folder: Path) -> bool:
    return any(any(folder.glob(kind)) for kind in _MODEL)


def _is_no_id(model: ModelRef) -> bool:
    return model.path.count("/") > 1 or model.path.startswith((".", "/", "~"))


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
    if _is_no_id(model):
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
            f"{model}: no folder here, and Hugging Face did not give it{offline}: "
            f"{str(error).splitlines()[0].removeprefix('Got: ')}"
        ) from error
    return Path(folder)
