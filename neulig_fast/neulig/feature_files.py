"""Files of cached features: written whole or not at all, checked when read.

``folder/<content hash>.safetensors`` holds ``keys`` (M, 16) uint8 and ``features`` (M, N, D). The
folder is named after the identity of the cache, which every file repeats. Files are never
rewritten, so several processes may add to one folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from .._checks import shape
from ..state_files import write_safetensors
from .content import KEY_BYTES

_FORMAT = "neulig_fast.features.1"
# Relative; what rounding does to features: other batch sizes, devices, TF32.
_ROUNDING = {torch.bfloat16: 0.1, torch.float16: 0.03}
_ROUNDING_ELSE = 0.01


def write_shard(folder: Path, keys: Sequence[bytes], features: Tensor) -> None:
    """Add one file with these rows: M keys and features (M, N, D)."""
    raw, features = b"".join(keys), features.contiguous().cpu()
    content = _content_hash(raw, features)
    tensors = {"keys": _as_tensor(raw), "features": features}
    metadata = {"format": _FORMAT, "identity": folder.name, "hash": content}
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / f"{content}.safetensors", tensors, metadata)


def read_shards(folder: Path) -> Iterator[tuple[list[bytes], Tensor]]:
    """Keys and features of every file.

    Raises:
        ValueError: a file that is damaged or belongs to another cache, with its path.
    """
    for path in sorted(folder.glob("*.safetensors")):
        raw, features = _read(path, folder.name)
        yield [raw[k : k + KEY_BYTES] for k in range(0, len(raw), KEY_BYTES)], features


def stale_faults(stored: Tensor, computed: Tensor, names: Iterable[str]) -> Iterator[str]:
    """Experts that now give something else than is stored, (B, N, D) each."""
    remedy = "delete the folder, or use another for every encoder"
    if stored.shape != computed.shape or stored.dtype != computed.dtype:
        yield f"holds features of another encoder, {shape(stored)} {stored.dtype}; {remedy}"
        return
    rounding = _ROUNDING.get(stored.dtype, _ROUNDING_ELSE)
    error = (stored - computed).double().norm(dim=2)
    scale = stored.double().norm(dim=2) + computed.double().norm(dim=2)
    for i, name in enumerate(names):
        if bool((error[:, i] > rounding * scale[:, i]).any()):
            yield f"holds features of another encoder, expert {name!r} gives others now; {remedy}"


def _read(path: Path, identity: str) -> tuple[bytes, Tensor]:
    remedy = "delete it to have its features computed again"
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if (metadata.get("format"), metadata.get("identity")) != (_FORMAT, identity):
                raise ValueError(f"features: {path} belongs to another cache; {remedy}")
            raw, features = file.get_tensor("keys").numpy().tobytes(), file.get_tensor("features")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"features: {path} cannot be read ({error}); {remedy}") from error
    if metadata.get("hash") != _content_hash(raw, features):
        raise ValueError(f"features: {path} is damaged, its hash does not fit; {remedy}")
    return raw, features


def _content_hash(keys: bytes, features: Tensor) -> str:
    digest = hashlib.blake2b(keys, digest_size=KEY_BYTES)
    digest.update(features.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _as_tensor(raw: bytes) -> Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, KEY_BYTES)
