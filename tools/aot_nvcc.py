"""csrc/cuda/*.cu compiled with nvcc for one architecture after the other; no GPU needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from aot_sass import CompiledKernel, find_cuobjdump, inspect

ROOT = Path(__file__).resolve().parents[1]


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = (shutil.which("nvcc", path=f"{home}/bin") for home in homes if home)
    return next(filter(None, found), shutil.which("nvcc"))


def missing() -> str | None:
    if find_nvcc() is None:
        return "no nvcc: set CUDA_HOME"
    return None if find_cuobjdump() else "no cuobjdump: install triton or the CUDA binary utilities"


def complaints() -> list[str]:
    return []


def compile_all(arch: int, _dtypes: Sequence[str], few: bool = False) -> list[CompiledKernel]:
    """The kernels of every .cu file; a file that does not compile raises with nvcc's words.

    ``few``: those in the installed extension, as they are, if it was built for ``arch``.
    """
    built = next((ROOT / "neulig_fast").glob("_C*.so"), None) if few else None
    if built is not None and (found := checked(inspect(built, arch))):
        return found
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    return [kernel for source in sources for kernel in compile_file(source, arch)]


def compile_file(source: Path, arch: int) -> list[CompiledKernel]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [
            find_nvcc() or "nvcc",
            "-cubin",
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            "-O3",
            "-fmad=false",  # as setup.py builds
            "-std=c++17",
            f"-I{ROOT / 'csrc'}",
            str(source),
            "-o",
            str(cubin),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{source.name} does not compile for sm_{arch}:\n{done.stderr}")
        return checked(inspect(cubin, arch))


def checked(kernels: list[CompiledKernel]) -> list[CompiledKernel]:
    """The kernels under readable names, with what is wrong about them."""
    for kernel in kernels:
        kernel.name = readable(kernel.name)
        if re.match(r"blend_(lists_)?(few|many)_kernel", kernel.name):
            few = re.search(r"_few_kernel<\w+, (\d+)>", kernel.name)
            kernel.check_blend(int(few[1]) if few else None)
        exact = re.search(r"offset_gram_partial.*Offsets<\w+, (\d+), .*true>", kernel.name)
        if exact:
            kernel.check_loads(int(exact[1]) + 1)
    return sorted(kernels, key=lambda kernel: kernel.name)


def readable(mangled: str) -> str:
    """A kernel's name and template arguments, as far as this machine can demangle."""
    if shutil.which("c++filt") is None:
        return mangled
    full = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip()
    short = re.sub(r"^void |neulig_fast::|\(anonymous namespace\)::", "", full)
    return short.split("(")[0]
