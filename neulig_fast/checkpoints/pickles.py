"""Checkpoints that ``torch.save`` wrote: what they hold and where, without reading a weight.

Such a file is a zip archive, not compressed: a pickle that describes tensors, and the bytes of each
storage as they are. PyTorch's restricted unpickler, which runs no code of the file, makes tensors
without memory of it; they know where their storages lie. So a tensor becomes a range of bytes, as
in a safetensors file, and is read like one. What the pickle says is checked against the archive.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._checks import raise_all
from . import dtypes
from .headers import Entry, Header

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
# Training scripts keep the state dict under one of these, beside what a merge does not need.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_ARCHIVE = b"PK\x03\x04"  # what zip archives begin with
_NAME_AT, _LOCAL_HEADER = 26, 30  # bytes of a zip archive's local header
_LONGEST_PICKLE = 100_000_000  # bytes, as of a header of safetensors
# What the unpickler raises on files that are broken, or made to break it.
_BROKEN = (
    *(pickle.UnpicklingError, RuntimeError, AssertionError, LookupError, ArithmeticError),
    *(ValueError, TypeError, AttributeError, EOFError, MemoryError, struct.error),
    *(zipfile.BadZipFile, zlib.error, OSError),
)


def read_header(path: Path) -> Header:
    """Tensors of a file of ``torch.save``, in the order of their bytes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no zip archive of little-endian, contiguous tensors by name, or one that
            contradicts itself or would run code; all faults.
    """
    with path.open("rb") as file:
        begins = file.read(4)
    if not begins.startswith(_ARCHIVE):
        raise ValueError(f"{path}: {_why_no_archive(begins)}{_conversion(path)}")
    try:
        records = _records(path)
        content = _described(path)
    except _BROKEN as error:
        raise ValueError(f"{path}: broken, or more than tensors: {_why(error)}") from error
    state = _state(path, content)
    faults = [fault for name, t in state.items() for fault in _faults(name, t, records)]
    raise_all(str(path), faults)
    entries = [_entry(path, name, tensor) for name, tensor in state.items()]
    entries.sort(key=lambda entry: (entry.start, entry.stop))
    return Header(tuple(entries), {})


def _why(error: BaseException) -> str:
    """In a line; PyTorch hides its reason behind advice on files that are trusted."""
    reason = error.__context__ if isinstance(error, pickle.UnpicklingError) else None
    lines = str(reason or error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _why_no_archive(begins: bytes) -> str:
    if begins.startswith(b"\x80"):
        return "written in PyTorch's old format, whose tensors cannot be read one by one; "
    return "not a zip archive of torch.save; if PyTorch can read it, "


def _conversion(path: Path) -> str:
    code = f"import torch; torch.save(torch.load({str(path)!r}, 'cpu'), {str(path)!r})"
    return f'convert it by: python -c "{code}"'


def _records(path: Path) -> dict[int, int]:
    """Where storages begin -> their bytes, as the archive has them."""
    found = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        size = path.stat().st_size
        for info in archive.infolist():
            name = info.filename.partition("/")[2]
            if name == "byteorder" and (info.file_size > 6 or archive.read(info) != b"little"):
                raise ValueError("its numbers are not little-endian")
            if name == "data.pkl" and info.file_size > _LONGEST_PICKLE:
                raise ValueError(f"its pickle has {info.file_size} bytes")
            if name == "constants.pkl":
                raise ValueError("it is a TorchScript archive")
            if not name.startswith("data/"):
                continue
            file.seek(info.header_offset + _NAME_AT)
            lengths = struct.unpack("<HH", file.read(_LOCAL_HEADER - _NAME_AT))
            start = info.header_offset + _LOCAL_HEADER + sum(lengths)
            if info.compress_type != zipfile.ZIP_STORED or start + info.file_size > size:
                raise ValueError(f"{info.filename} is compressed or cut short")
            found[start] = info.file_size
    return found


def _described(path: Path) -> Any:
    """The file's content, of tensors without memory."""
    import torch

    return torch.load(path, map_location="meta", weights_only=True)


def _state(path: Path, content: Any) -> dict[str, Tensor]:
    import torch

    if isinstance(content, Mapping):
        wrapped = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
        content = wrapped[0] if wrapped else content
    if not isinstance(content, Mapping):
        raise ValueError(f"{path}: must be a dict of tensors by name, got {type(content).__name__}")
    others = [
        f"{str(name)[:60]!r} is {type(value).__name__}, not a tensor"
        for name, value in content.items()
        if not isinstance(value, torch.Tensor) or not isinstance(name, str)
    ]
    raise_all(f"{path}: must be a dict of tensors by name", others)
    return dict(content)


def _faults(name: str, tensor: Tensor, records: Mapping[int, int]) -> Iterator[str]:
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized:
        yield f"{name!r} must be dense and not quantized"
        return
    if dtypes.of_torch(tensor.dtype) is None:
        yield f"{name!r} has dtype {tensor.dtype}, which is not read"
        return
    if not tensor.is_contiguous() or tensor.is_neg():
        yield f"{name!r} must be contiguous: save it so, with .contiguous()"
        return
    start = _storage_start(tensor)
    if tensor.numel() and start not in records:
        yield f"{name!r} has a storage that the archive has not"
    elif tensor.numel():
        needs = (tensor.storage_offset() + tensor.numel()) * tensor.itemsize
        if needs > records[start]:
            yield f"{name!r} needs {needs} bytes of a storage, which has {records[start]}"


def _storage_start(tensor: Tensor) -> int:
    """The byte of the file that its storage begins with; -1 where PyTorch does not tell."""
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None) or -1


def _entry(path: Path, name: str, tensor: Tensor) -> Entry:
    start = _storage_start(tensor) + tensor.storage_offset() * tensor.itemsize
    start = start if tensor.numel() else 0
    dtype = dtypes.of_torch(tensor.dtype) or ""
    return Entry(name, dtype, tuple(tensor.shape), path, start, start + tensor.nbytes)
