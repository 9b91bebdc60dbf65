"""Settings of the whole suite. The environment is set before torch or triton is imported."""

import os

# Waiting threads yield: a spinning pool starves the other core of a small machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import importlib.util
import sys

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

# The project's root is on the path, and transformers would take its kernels for a package.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
