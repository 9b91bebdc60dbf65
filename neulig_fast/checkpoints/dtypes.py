"""Names of types: those of safetensors files, of recipes and of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Recipes write them as torch does.
TO_FORMAT = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_TORCH = {
    **{format: name for name, format in TO_FORMAT.items()},
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}


def is_float(dtype: str) -> bool:
    """Whether tensors of it can be merged."""
    return "F" in dtype


def common(dtypes: Sequence[str]) -> str:
    """The narrowest type that methods compute from and that holds all values of these exactly."""
    kinds = {"BF16" if dtype.startswith("F8") else dtype for dtype in dtypes}
    if len(kinds) == 1:
        return kinds.pop()
    return "F64" if "F64" in kinds else "F32"


def as_torch(dtype: str) -> torch.dtype:
    """torch's name for it."""
    import torch

    return vars(torch)[_TORCH[dtype]]


def of_torch(dtype: torch.dtype) -> str | None:
    """The format's name of torch's; None for one that it does not have."""
    names = {f"torch.{name}": format for format, name in _TORCH.items()}
    return names.get(str(dtype))
