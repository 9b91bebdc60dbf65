"""Models by folder, or by Hugging Face id: from the cache, or fetched into it."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from .adapters import adapted
from .checkpoint import Checkpoint, json_object, open_checkpoint
from .headers import INDEX, SINGLE
from .recipe import ModelRef

# What a merge may need of a repository besides weights, and the weights: the first that are there.
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "tokenizer*")
_WEIGHTS = (SINGLE, "*.safetensors", "pytorch_model.bin")
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
# Where shards are in the place of a single file.
_INDEXES = {SINGLE: INDEX, "pytorch_model.bin": "pytorch_model.bin.index.json"}
# Any of them makes a folder a model.
_MODEL = ("config.json", "*.safetensors", "pytorch_model*.bin", "adapter_model.bin")


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
                lora = folder_of(model.lora, base, _ADAPTER)
                checkpoint = adapted(checkpoint, lora, str(model))
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
            near = _places(part, base)
            inside = len(Path(part.path).parts) > 1 and any(
                _is_model(place.parent) for place in near
            )
            if not any(map(os.path.exists, near)) and (inside or _is_no_id(part)):
                found.append(f"{part}: no such folder")
    return list(dict.fromkeys(found))


def _places(model: ModelRef, base: Path) -> list[Path]:
    """Where a folder of that name may be; none in the home of somebody who is not known."""
    try:
        path = Path(model.path).expanduser()
    except RuntimeError:
        return []
    return [base / path, path]


def _is_model(folder: Path) -> bool:
    return any(any(folder.glob(kind)) for kind in _MODEL)


def _is_no_id(model: ModelRef) -> bool:
    return model.path.count("/") > 1 or model.path.startswith((".", "/", "~"))


def folder_of(model: ModelRef, base: Path, weights: Iterable[str] = _WEIGHTS) -> Path:
    """Where a model lies; fetched from Hugging Face if it is no folder here.

    Args:
        weights: patterns of files of weights, of which the first are fetched that are there.

    Raises:
        ValueError: neither a folder nor an id whose files can be had.
    """
    for path in _places(model, base):
        if path.exists():
            if model.revision is not None:
                raise ValueError(f"{model}: {path} is a folder here, which has no revisions")
            return path
    if _is_no_id(model):
        raise ValueError(f"{model}: no such folder")
    folder = _fetched(model, model.revision, ())
    commit = folder.name  # the rest is of the same, even if somebody pushes meanwhile
    for file in weights:
        files = _shards(folder / _INDEXES.get(file, "")) or [file]
        _fetched(model, commit, files)
        if any(fnmatchcase(path.name, name) for path in folder.iterdir() for name in files):
            break
    return folder


def _shards(index: Path) -> list[str]:
    """Patterns of the files that an index names, which are checked when it is opened; none if there
    is no such index, or it is broken."""
    if not index.is_file():
        return []
    try:
        weight_map = json_object(index, index.read_bytes()).get("weight_map")
    except ValueError:
        return []
    names = weight_map.values() if isinstance(weight_map, dict) else ()
    return sorted({glob.escape(str(name)) for name in names})


def _fetched(model: ModelRef, revision: str | None, files: Iterable[str]) -> Path:
    """The cache's folder of a revision, after what is missing of it was fetched."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError

    # Of httpx or of requests: what ends a connection, too, is of the library's own.
    of_http: type[Exception] = HfHubHTTPError.__bases__[0]
    try:
        folder = snapshot_download(
            model.path,
            revision=revision,
            allow_patterns=[*_SMALL, *files],
            ignore_patterns=["*/*"],  # other formats and earlier steps: stars match slashes too
        )
    except HFValidationError as error:
        raise ValueError(f"{model}: no folder here, and no id of Hugging Face's") from error
    except (of_http, OSError, ValueError) as error:
        raise ValueError(f"{model}: {_why_not(model, error)}") from error
    return Path(folder)


def _why_not(model: ModelRef, error: Exception) -> str:
    from huggingface_hub import constants, utils

    if isinstance(error, utils.GatedRepoError):
        page = f"{constants.ENDPOINT}/{model.path}"
        return f"Hugging Face gives it to some alone; ask for access at {page}, and set HF_TOKEN"
    if isinstance(error, utils.RepositoryNotFoundError):
        return (
            "no folder here, and no repository of Hugging Face's, or a private one, which asks for "
            "HF_TOKEN"
        )
    if isinstance(error, utils.RevisionNotFoundError):
        return f"Hugging Face has {model.path}, but no revision {model.revision!r} of it"
    if constants.HF_HUB_OFFLINE:
        return (
            "no folder here, and Hugging Face's cache lacks it, or a part of it (HF_HUB_OFFLINE is "
            "set, nothing is fetched)"
        )
    lines = str(error).splitlines() or [type(error).__name__]
    return f"no folder here, and Hugging Face did not give it: {lines[0].removeprefix('Got: ')}"
