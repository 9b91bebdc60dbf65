"""Settings of the whole suite. The environment is set before torch or triton is imported."""

import os

# Waiting threads yield: a spinning pool starves the other core of a small machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import fcntl
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

# The project's root is on the path, and transformers would take its kernels for a package.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _patch_triton_once_per_launch() -> None:
    """The interpreter patches triton.language for a launch, and then, which changes nothing any
    more and is the greater part of its time, at every call of a helper from a kernel."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    language = {id(interpreter.tl), id(interpreter.tl.core)}
    patched: set[int] = set()

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:  # when a launch ends, and only then
            super().restore()
            patched.clear()

    def patch_once(function: Callable[..., Any]) -> Scope:
        modules = language & {id(value) for value in function.__globals__.values()}
        if modules and modules <= patched:
            return Scope()
        patched.update(modules)
        return patch(function)

    interpreter._LangPatchScope, interpreter._patch_lang = Scope, patch_once


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """``python -c code *words`` with changes of the environment, without the seconds in which torch
    is imported: see forks.py. A variable that is None is removed."""
    root, folder = Path(__file__).parents[1], tmp_path_factory.mktemp("forks")
    files = [folder / "out", folder / "err"]
    server = subprocess.Popen(
        [sys.executable, str(root / "tests/forks.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(code: str, *words: object, **changes: str | None) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in {**os.environ, **changes}.items() if v is not None}
        for file in files:
            file.write_text("")
        call = [code, [*map(str, words)], environment, *map(str, (root, *files))]
        print(json.dumps(call), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(code, status, *(file.read_text() for file in files))

    with server:
        yield run
        server.stdin.close()


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """``once(name, make)``: a folder that ``make`` has filled, once for all of xdist's workers."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def made(name: str, make: Callable[[Path], None]) -> Path:
        folder = root / name
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                making = tmp_path_factory.mktemp(name)
                make(making)
                making.rename(folder)
        return folder

    return made
