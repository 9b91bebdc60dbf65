"""State dicts from files, safely, and files that are either old or new but never half written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import secrets
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_WRITE_BYTES = 1 << 26
# The two ways torch's weights-only unpickler names a class or function it will not call.
_REFUSED_GLOBAL = re.compile(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) (\S+)")
# What torch.load raises on damaged files: 6000 of them, with bytes changed, cut or random.
_DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Tensors by name from a safetensors file or a weights-only torch file, on the CPU.

    safetensors files are known by suffix or by content; anything else is read by ``torch.load``
    with ``weights_only=True``, so no code in a file ever runs. Both are memory-mapped where the
    format allows. Two wrappings are taken off: a checkpoint's ``{"state_dict": {...}}``, and the
    prefix ``module.`` if all names have it (DataParallel).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder; an empty, truncated or damaged file; a pickle that needs code to run;
            a file that holds something else than tensors by name.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a file of weights")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path}: the file is empty")
    if path.suffix == ".safetensors" or _looks_like_safetensors(path, size):
        content = _read_safetensors(path)
    else:
        content = _read_torch(path)
    return _tensors_by_name(content, path)


def _looks_like_safetensors(path: Path, size: int) -> bool:
    """Eight bytes of header length, then a JSON object of that length."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8


def _read_safetensors(path: Path) -> Any:
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: not a complete safetensors file ({error}); "
            "it may be truncated or of another format"
        ) from error


def _read_torch(path: Path) -> Any:
    with path.open("rb") as file:
        zipped = file.read(2) == b"PK"
    if zipped and not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: the file is truncated (a torch file without its end)")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except _DAMAGE as error:
        raise ValueError(f"{path}: {_why_refused(error)}") from error


def _why_refused(error: Exception) -> str:
    refused = _REFUSED_GLOBAL.search(str(error))
    remedy = "save the weights alone, torch.save(model.state_dict(), path), or as safetensors"
    if refused:
        return f"loading this pickle needs to run {refused[1]}, which is refused; {remedy}"
    if "TorchScript" in str(error):
        return f"a TorchScript archive holds code, which is refused; {remedy}"
    reason = next((line for line in map(str.strip, str(error).splitlines()) if line), repr(error))
    return f"not a readable torch file, damaged or of another format ({reason.split('. ')[0]})"


def _tensors_by_name(content: Any, path: Path) -> dict[str, torch.Tensor]:
    if isinstance(content, Mapping) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise ValueError(f"{path}: holds a {kind}, expected tensors by name (a state dict)")
    if not content:
        raise ValueError(f"{path}: holds no tensors")
    wrong = [
        f"{name!r} ({type(value).__name__})"
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, torch.Tensor))
    ]
    if wrong:
        raise ValueError(
            f"{path}: not a state dict; these entries are no tensors: {', '.join(wrong)}"
        )
    prefix = "module." if all(name.startswith("module.") for name in content) else ""
    return {name[len(prefix) :]: value.detach() for name, value in content.items()}


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors by name as a safetensors file, atomically (see :func:`write_text`).

    Any device, strides and sharing: each tensor is written as if it were contiguous and its own,
    one at a time, so no copy of the whole is made. The same tensors give the same bytes.

    Raises:
        ValueError: an entry that is not a dense tensor of a dtype the format has, a name or
            metadata that is not text; all of them listed. Nothing has been written.
        OSError: the disk is full or the like; an existing file is left as it was.
    """
    header = _safetensors_header(path, tensors, metadata)

    def write(file: BinaryIO) -> None:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in _file_order(tensors):
            flat = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8)
            for block in flat.split(_WRITE_BYTES):
                file.write(block.cpu().numpy().data)

    _replace(path, write)


def _file_order(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Widest elements first, as the format's own writer does: every tensor stays aligned."""
    return sorted(tensors, key=lambda name: -tensors[name].element_size())


def _safetensors_header(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None,
) -> bytes:
    wrong = list(_unwritable(tensors, metadata or {}))
    if wrong:
        raise ValueError(f"{path}: cannot be written as safetensors: {'; '.join(wrong)}")
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name in _file_order(tensors):
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _SAFETENSORS_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    header = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)


def _unwritable(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Iterator[str]:
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            yield f"{name!r} is not a possible name"
        if not isinstance(tensor, torch.Tensor):
            yield f"{name} is a {type(tensor).__name__}, not a tensor"
        elif tensor.layout != torch.strided or tensor.device.type == "meta":
            yield f"{name} is not dense ({tensor.layout} on {tensor.device})"
        elif tensor.dtype not in _SAFETENSORS_DTYPES:
            yield f"{name} has dtype {tensor.dtype}"
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            yield f"metadata {key!r} is not text: {value!r}"


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` as indented JSON, atomically (see :func:`write_text`).

    Raises:
        TypeError, ValueError: ``obj`` is not JSON (NaN and infinity are not). Nothing written.
        OSError: the disk is full or the like; an existing file is left as it was.
    """
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` in UTF-8, atomically.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and replace the
    old file in one step, so a reader, a crash or a full disk never meets half a file.

    Raises:
        OSError: the disk is full or the like; an existing file is left as it was.
    """

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    _replace(path, write)


def make_writable_folder(path: str | os.PathLike[str]) -> None:
    """Create the folder where it is missing and try it with a file: before hours of work.

    Raises:
        OSError: naming the folder; it cannot be created or takes no files.
    """
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(error.errno, f"cannot write to {path}: {error.strerror}") from error


def _replace(path: str | os.PathLike[str], write: Callable[[BinaryIO], None]) -> None:
    target = Path(os.path.realpath(path))  # a link keeps pointing to the new file
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        kept = "the old file is unchanged" if target.exists() else "nothing was written"
        reason = f"could not write {path}: {error.strerror or error}; {kept}"
        raise OSError(error.errno, reason) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make the new directory entry survive a power cut, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
