"""Compile every GPU kernel without a GPU and look at the machine code (`make aot`).

Triton kernels exactly as their launchers launch them, and csrc/cuda/*.cu with nvcc, for sm_80,
sm_90 and sm_100: one line per kernel with its registers, spills, stack and global accesses
by width in bits. Exit status 1 if a kernel spills, has a stack frame or, by Triton, more registers
or shared memory than a multiprocessor, if `blend` reads or writes its main path in less than 128
bits or contracts a multiplication and an addition, if a linear layer does not multiply by its
architecture's tensor cores, or if a jitted function is reached by no kernel. What cannot be done
here (no triton, no nvcc) is said, not hidden.
"""

from __future__ import annotations

import argparse
import os
import sys

import aot_nvcc
import aot_triton
from aot_sass import HEADER, CompiledKernel

ARCHS = (80, 90, 100)


def report(kernels: list[CompiledKernel]) -> int:
    """Print one line per kernel; the number of those with faults."""
    for kernel in kernels:
        print(kernel.line())
    faulty = [kernel for kernel in kernels if kernel.faults]
    for kernel in faulty:
        print(f"FAULT {kernel.name} sm_{kernel.arch}: {'; '.join(kernel.faults)}")
    return len(faulty)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHS, help="80 90 100")
    parser.add_argument("--only", choices=("triton", "nvcc"))
    parser.add_argument("--dtype", nargs="*", default=aot_triton.DTYPES, help="of Triton kernels")
    parser.add_argument(
        "--few",
        action="store_true",
        help="two cases of each Triton kernel; the built extension as it is",
    )
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
    print(HEADER)
    compiled = faults = 0
    for name, tool in (("triton", aot_triton), ("nvcc", aot_nvcc)):
        missing = tool.missing()
        if options.only not in (None, name) or missing:
            print(f"skipped: {name} kernels" + (f" ({missing})" if missing else ""))
            continue
        for arch in options.arch:
            kernels = tool.compile_all(arch, options.dtype, options.few)
            compiled += len(kernels)
            faults += report(kernels)
        for complaint in tool.complaints():
            print(f"FAULT {complaint}")
            faults += 1
    print(f"{compiled} kernels compiled, {faults} with faults")
    return 1 if faults or not compiled else 0


if __name__ == "__main__":
    sys.exit(main())
