"""What features depend on, as hashes: an image's content, the experts' weights, the encoder."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..pool import ExpertPool

KEY_BYTES = 16


def pool_identity(pool: ExpertPool) -> str:
    """Hex hash of the experts' weights and of what the encoder does with them.

    Of code and foreign objects only the names are known, so two encoders may share an identity:
    who relies on it recomputes a sample.
    """
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
            if key != "training" and not key.startswith("_"):
                yield f"{name}.{key} = {_said(value)}"
    stored = template.state_dict().keys()
    for name, buffer in template.named_buffers():
        if name not in stored:
            yield f"{name} = {_said(buffer)}"


def _said(value: object) -> str:
    """A setting as text, the same in every process; of what cannot be said so, the type."""
    if isinstance(value, bool | int | float | str | None):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_said, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_said(k)}: {_said(v)}' for k, v in value.items())}}}"
    if isinstance(value, functools.partial):
        return f"partial({_said(value.func)}, {_said(value.args)}, {_said(value.keywords)})"
    if isinstance(value, Tensor) and value.layout == torch.strided and value.numel():
        return image_keys(value.reshape(1, -1))[0].hex()
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
