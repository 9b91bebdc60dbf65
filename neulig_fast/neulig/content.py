"""What features depend on, as hashes: an image's content, the experts' weights, the encoder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..pool import ExpertPool

KEY_BYTES = 16


def pool_identity(pool: ExpertPool) -> str:
    """Hex hash of the experts' weights and of what the encoder does with them."""
    digest = hashlib.blake2b(pool.fingerprint.encode(), digest_size=KEY_BYTES)
    for line in _describe(pool.template):
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


def image_keys(images: Tensor) -> list[bytes]:
    """16-byte content hashes of a batch's images: bytes, dtype and shape."""
    pixels = images.detach().cpu().contiguous()
    header = f"{pixels.dtype}{tuple(pixels.shape[1:])}".encode()
    start = hashlib.blake2b(header, digest_size=KEY_BYTES)
    keys = []
    for row in pixels.view(len(pixels), -1).view(torch.uint8).numpy():
        digest = start.copy()
        digest.update(row)
        keys.append(digest.digest())
    return keys


def _describe(template: nn.Module | None) -> Iterator[str]:
    """What an encoder computes beyond its weights, as text: its modules and their settings."""
    if template is None:
        return
    for name, module in template.named_modules():
        yield f"{name}: {type(module).__module__}.{type(module).__qualname__}"
        for key, value in sorted(vars(module).items()):
            if callable(value) and hasattr(value, "__qualname__"):
                yield f"{name}.{key} = {value.__module__}.{value.__qualname__}"
            elif key != "training" and not key.startswith("_") and _is_plain(value):
                yield f"{name}.{key} = {value!r}"
    stored = template.state_dict().keys()
    for name, buffer in template.named_buffers():
        if name not in stored and buffer.numel():
            yield f"{name} = {image_keys(buffer.reshape(1, -1))[0].hex()}"


def _is_plain(value: object) -> bool:
    """Whether ``repr`` says all there is to say, and the same in every process."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | None)
