"""Saving and loading an engine: a folder of safetensors and one JSON file, nothing pickled.

``neulig.json``                      settings, tasks, names of the files, hashes
``state-<hash>.safetensors``         Portland, heads, calibration vectors, history
``expert<i>-<hash>.safetensors``     expert i's state dict, loadable on its own

The JSON file is replaced last. Files of different content have different names, so until then the
previous save stays whole; afterwards all other files with such names are removed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._checks import FLOAT_DTYPES, raise_all
from ..pool import ExpertPool
from ..state_files import read_state_dict, write_json, write_safetensors
from .heads import Head
from .history import History

if TYPE_CHECKING:
    from .engine import NeuLig

_FORMAT = "neulig_fast.engine.1"
_INDEX = "neulig.json"
_FILE = re.compile(r"(state|expert\d+)-[0-9a-f]{16}\.safetensors")
_HISTORY_TENSORS = ("boosting", "alignment", "validation")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOAT_DTYPES}
# Of the JSON file: a type, a list of one layout, or an object with a layout for every key.
_LAYOUT: dict[str, Any] = {
    "format": str,
    "settings": {"alignment": str, "boosting": str, "scaling": float, "seed": int},
    "tasks": [{"name": str, "normalize": bool}],
    "experts": {
        "names": [str],
        "files": [str],
        "dtype": str,
        "keys": [str],
        "buffers": [str],
        "fingerprint": str,
    },
    "state": str,
}
_HISTORY = {
    "tasks": [str],
    "epoch": int,
    "start": int,
    "starts": [float],
    "rounds_per_epoch": int,
}


def save(engine: NeuLig, path: str | Path) -> None:
    """See :meth:`NeuLig.save`."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    state = _state(engine)
    index = _index(engine, f"state-{_hash(state)}.safetensors")
    write_safetensors(folder / index["state"], state)
    for i, name in enumerate(index["experts"]["files"]):
        write_safetensors(folder / name, _stored(engine.pool, i))
    write_json(folder / _INDEX, index)
    for path in folder.iterdir():
        if _FILE.fullmatch(path.name) and path.name not in _files(index):
            path.unlink(missing_ok=True)


def load(
    cls: type[NeuLig],
    path: str | Path,
    template: nn.Module | None,
    device: torch.device | str | None,
    cache_folder: str | Path | None,
) -> NeuLig:
    """See :meth:`NeuLig.load`."""
    folder = Path(path)
    index = _read_index(folder)
    state = read_state_dict(folder / index["state"])
    if index["state"] != f"state-{_hash(state)}.safetensors":
        raise ValueError(f"{folder / index['state']} is damaged: its hash does not fit its name")
    raise_all(str(folder / index["state"]), _state_faults(index, state))
    pool = _load_pool(folder, index["experts"], template, device)
    heads = {
        task["name"]: Head(
            state[f"head.{k}.weight"], state.get(f"head.{k}.bias"), task["normalize"]
        )
        for k, task in enumerate(index["tasks"])
    }
    engine = cls(pool, heads, **index["settings"], cache_folder=cache_folder)
    with torch.no_grad():
        engine.portland.weight.copy_(state["portland.weight"])
        engine.portland.bias.copy_(state["portland.bias"])
    engine.calibration = _calibration(heads, state)
    if index["history"] is not None:
        engine.history = _history(index["history"], state)
    return engine


def calibration(path: str | Path) -> dict[str, Tensor]:
    """A saved engine's merge vectors by task, (N,) each, without its experts."""
    folder = Path(path)
    index = _read_index(folder)
    return _calibration(
        [task["name"] for task in index["tasks"]], read_state_dict(folder / index["state"])
    )


# -- the pieces --------------------------------------------------------------------------------


def _index(engine: NeuLig, state_file: str) -> dict[str, Any]:
    pool, history = engine.pool, engine.history
    settings = ("alignment", "boosting", "scaling", "seed")
    scalars = None
    if history is not None:
        scalars = {
            key: value for key, value in vars(history).items() if key not in _HISTORY_TENSORS
        }
    return {
        "format": _FORMAT,
        "settings": {key: getattr(engine, key) for key in settings},
        "tasks": [{"name": t, "normalize": h.normalize} for t, h in engine.heads.items()],
        "experts": {
            "names": list(pool.names),
            "files": [
                f"expert{i}-{pool.fingerprint[:16]}.safetensors" for i in range(pool.num_experts)
            ],
            "dtype": str(pool.params.dtype).removeprefix("torch."),
            "keys": list(pool.state_dict(0)),  # the files do not keep their order
            "buffers": [s.name for s in pool.segments if s.kind == "buffer"],
            "fingerprint": pool.fingerprint,
        },
        "state": state_file,
        "history": scalars,
    }


def _state(engine: NeuLig) -> dict[str, Tensor]:
    tensors = {
        "portland.weight": engine.portland.weight.detach(),
        "portland.bias": engine.portland.bias.detach(),
    }
    for k, (task, head) in enumerate(engine.heads.items()):
        tensors[f"head.{k}.weight"] = head.weight
        if head.bias is not None:
            tensors[f"head.{k}.bias"] = head.bias
        if task in engine.calibration:
            tensors[f"calibration.{k}"] = engine.calibration[task]
    if engine.history is not None:
        for key in _HISTORY_TENSORS:
            tensors[f"history.{key}"] = getattr(engine.history, key)
    return tensors


def _calibration(tasks: Iterable[str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {task: state.get(f"calibration.{k}") for k, task in enumerate(tasks)}
    return {task: vector for task, vector in found.items() if vector is not None}


def _history(scalars: Mapping[str, Any], state: Mapping[str, Tensor]) -> History:
    tensors = {key: state[f"history.{key}"] for key in _HISTORY_TENSORS}
    known = {**scalars, "tasks": tuple(scalars["tasks"]), "starts": tuple(scalars["starts"])}
    return History(**known, **tensors)


def _stored(pool: ExpertPool, i: int) -> dict[str, Tensor]:
    """Expert ``i`` in the dtypes it came in: exact, whether the arena is wider or narrower."""
    original = {s.name: s.dtype for s in pool.segments}
    return {k: v.to(original.get(k, v.dtype)) for k, v in pool.state_dict(i).items()}


def _load_pool(
    folder: Path,
    experts: Mapping[str, Any],
    template: nn.Module | None,
    device: torch.device | str | None,
) -> ExpertPool:
    states = [read_state_dict(folder / name) for name in experts["files"]]
    if any(state.keys() != set(experts["keys"]) for state in states):
        raise ValueError(f"{folder}: the experts' files hold other tensors than those saved")
    states = [{key: state[key] for key in experts["keys"]} for state in states]
    # Without a template, a module without code still tells parameters from buffers.
    outline = template or _outline(states[0], set(experts["buffers"]))
    pool = ExpertPool(states, outline, experts["names"], _DTYPES[experts["dtype"]], device or "cpu")
    if pool.fingerprint != experts["fingerprint"]:
        raise ValueError(f"{folder}: the experts' files are not those that were saved")
    if template is None:
        pool.template = None
    return pool


def _outline(state: Mapping[str, Tensor], buffers: set[str]) -> nn.Module:
    root = nn.Module()
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        if name in buffers or not tensor.is_floating_point():
            module.register_buffer(leaf, tensor)
        else:
            module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    return root


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / _INDEX
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {folder} holds no saved engine")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        raise ValueError(f"{path} is not of the format {_FORMAT}")
    history = type(None) if index.get("history") is None else _HISTORY
    raise_all(str(path), _layout_faults(index, {**_LAYOUT, "history": history}))
    raise_all(str(path), _content_faults(index))
    return index


def _layout_faults(value: Any, layout: Any, place: str = "the file") -> Iterator[str]:
    """Where ``value`` is not what ``layout`` says."""
    kind = type(layout) if isinstance(layout, dict | list) else layout
    if not isinstance(value, kind):
        yield f"{place} must be of the type {kind.__name__}, got {value!r}"
    elif isinstance(layout, list):
        for k, item in enumerate(value):
            yield from _layout_faults(item, layout[0], f"{place}[{k}]")
    elif isinstance(layout, dict):
        for key in sorted({*layout, *value}):
            if key in layout and key in value:
                yield from _layout_faults(value[key], layout[key], key)
            else:
                yield f"{place} {'lacks' if key in layout else 'has an unknown'} {key!r}"


def _content_faults(index: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(_files(index)):
        if not _FILE.fullmatch(name):
            yield f"{name!r} is no name of a file of an engine"
    if index["experts"]["dtype"] not in _DTYPES:
        yield f"dtype must be one of {', '.join(_DTYPES)}, got {index['experts']['dtype']!r}"


def _state_faults(index: Mapping[str, Any], state: Mapping[str, Tensor]) -> Iterator[str]:
    names = ["portland.weight", "portland.bias"]
    names += [f"head.{k}.weight" for k in range(len(index["tasks"]))]
    if index["history"] is not None:
        names += [f"history.{key}" for key in _HISTORY_TENSORS]
    for name in names:
        if name not in state:
            yield f"lacks {name}"


def _files(index: Mapping[str, Any]) -> set[str]:
    return {index["state"], *index["experts"]["files"]}


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
