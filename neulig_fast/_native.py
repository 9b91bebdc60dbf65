"""Loads the native extension neulig_fast._C once and remembers, in words, why not.

The extension holds kernels only; its operators are defined in Python, in `neulig_fast_C`. Whether
an operator has a native kernel is asked of torch's dispatcher, never guessed from the build.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

BUILD_INFO = Path(__file__).with_name("_build_info.json")
REMEDY = "pip install -v --no-build-isolation -e ."


@functools.cache
def build_info() -> dict[str, Any]:
    """What setup.py wrote (built, reason, date, torch, cxx, nvcc, archs), or empty."""
    try:
        return json.loads(BUILD_INFO.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        return {"built": "none", "reason": f"{BUILD_INFO.name} cannot be read ({error})"}


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The extension, or None and why."""
    name = f"{__package__}._C"
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError:
        reason = build_info().get("reason") or "setup.py was not run here"
        return None, f"not built: {reason}. Remedy: {REMEDY}"
    except ImportError as error:
        return None, f"built, but cannot be loaded: {error}. Remedy: rebuild with {REMEDY}"


def has(op: str, key: str) -> bool:
    """Whether `neulig_fast_C::<op>` has a native kernel for the dispatch key "CPU" or "CUDA".

    RuntimeError when no such operator was defined: a misspelt name is no missing kernel.
    """
    module, _ = _load()
    if module is None:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"neulig_fast_C::{op}", key)


def why_missing(op: str, key: str) -> str | None:
    """Why `has(op, key)` is False, in words, with the remedy; None when it is True."""
    module, reason = _load()
    if module is None:
        return reason
    if has(op, key):
        return None
    stored = build_info().get("reason")
    if key == "CUDA" and build_info().get("built") == "cpp" and stored:
        return f"built without CUDA: {stored}. Remedy: {REMEDY}"
    return f"the native extension has no {key} kernel for {op}"


def describe() -> str:
    """One line: what the native extension is on this machine, or why there is none."""
    module, reason = _load()
    if module is None:
        return f"native extension {reason}"
    info = build_info()
    parts = [f"_C ({info.get('built', 'unknown build')}) for torch>=2.11"]
    if "nvcc" in info:
        parts.append(f"CUDA {info['nvcc']}, {' '.join(info['archs'])}")
    parts.append(f"CPU kernels: {_cpu_level(module)}")
    parts += [str(info[key]) for key in ("cxx", "date") if key in info]
    return ", ".join(parts)


def _cpu_level(module: ModuleType) -> str:
    try:
        level = module.cpu_level()
    except RuntimeError as error:  # NEULIG_FAST_CPU asks for what this CPU cannot do
        return str(error)
    return f"x86-64-v{level}" if level else "baseline"
