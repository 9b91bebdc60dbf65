"""``LazyStateDict`` reads tensors of safetensors files one by one.

The original opens a file, and parses its header, for every tensor: for a checkpoint of T tensors T
times a header of T entries. Here each dictionary keeps the files that it has read from open, for
as long as they are the same files and it is there itself.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

from safetensors import safe_open
from torch import Tensor

from .._seam import Seam, Unsupported


def seams() -> list[Seam]:
    """Of the one function that reads."""
    where = "fusion_bench.utils.lazy_state_dict:LazyStateDict._load_tensor_from_checkpoint_file"
    return [Seam(where, load_tensor, load_tensor)]


# By the id of a dictionary, which has no hash: what its files were when they were opened.
_OPEN: dict[int, dict[str, tuple[Any, Any]]] = {}
_lock = threading.Lock()


def load_tensor(self: Any, checkpoint_file: str, key: str, update_cache: bool = True) -> Tensor:
    """A tensor of its own: what is read from one open file shares its memory."""
    if not checkpoint_file.endswith(".safetensors"):
        raise Unsupported("a file that is no safetensors file")
    with _lock:
        file = _opened(self, checkpoint_file)
    read = file.get_tensor(key)  # several threads may read at once
    kind = read.dtype if self._torch_dtype is None else self._torch_dtype
    tensor: Tensor = read.to(kind, copy=True)
    if update_cache and self._state_dict_cache is not None:
        self._state_dict_cache[key] = tensor
    return tensor


def _opened(owner: Any, path: str) -> Any:
    try:
        status = os.stat(path)
    except OSError:
        raise Unsupported("a file that cannot be read") from None
    state = (owner._device, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
    if id(owner) not in _OPEN:
        _OPEN[id(owner)] = {}
        weakref.finalize(owner, _OPEN.pop, id(owner), None)
    files = _OPEN[id(owner)]
    if path not in files or files[path][0] != state:
        files[path] = state, safe_open(path, framework="pt", device=owner._device)
    return files[path][1]
