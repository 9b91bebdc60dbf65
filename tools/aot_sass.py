"""What a cubin says about its kernels: registers, stack, spills, global accesses by width."""

from __future__ import annotations

import collections
import dataclasses
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

HEADER = f"{'kernel':52} {'arch':>4} {'regs':>4} {'stack':>5} {'spills':>6} {'shared':>6}  accesses"
# What multiplies matrices in a tile of 64 rows or more; smaller ones take HMMA everywhere.
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
REGISTERS, SHARED = 65536, {80: 166912, 90: 232448, 100: 232448}  # of a program, at most
WIDTHS = {".128": 128, ".64": 64, ".U16": 16, ".S16": 16, ".U8": 8, ".S8": 8}


@dataclasses.dataclass
class CompiledKernel:
    """One kernel of a cubin.

    ``spills`` counts accesses to local memory, ``fused`` fused multiply-adds and ``products`` those
    of matrices, by instruction; ``loads``, to registers or to shared memory, and ``stores`` are
    those of global memory by their width in bits.
    """

    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    spills: int
    fused: int
    loads: dict[int, int]
    stores: dict[int, int]
    products: dict[str, int] = dataclasses.field(default_factory=dict)
    faults: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.spills:
            self.faults.append(f"{self.spills} spills")
        if self.stack:
            self.faults.append(f"a stack frame of {self.stack} bytes")

    def check_blend(self, experts: int | None, *, narrow_stores: bool = False) -> None:
        """Fault a blend that contracts, or whose ``experts`` loads and stores are not 128 bit.

        Stores may be narrower where the output is of another type than the experts.
        """
        if self.fused:
            self.faults.append(f"{self.fused} fused multiply-adds")
        wide_stores = narrow_stores or self.stores.get(128)
        if experts and (self.loads.get(128, 0) < experts or not wide_stores):
            self.faults.append(f"narrow accesses on the main path of {experts} experts")

    def check_loads(self, experts: int) -> None:
        """Fault a kernel that does not load ``experts`` rows in 128 bits."""
        if self.loads.get(128, 0) < experts:
            self.faults.append(f"narrow loads on the main path of {experts} experts")

    def check_tensor_cores(self, rows: int) -> None:
        """Fault a kernel whose tiles of ``rows`` rows are not multiplied as fast as can be."""
        wanted = TENSOR_CORES[self.arch] if rows >= 64 else "HMMA"
        if not self.products.get(wanted):
            self.faults.append(f"no {wanted} in tiles of {rows} rows")

    def check_fits(self, num_warps: int) -> None:
        """Fault a kernel that no multiprocessor has room for: its launch would fail."""
        registers = 32 * num_warps * -(-self.registers // 8) * 8
        if registers > REGISTERS:
            self.faults.append(f"{registers} registers in {num_warps} warps, of {REGISTERS}")
        if self.shared > SHARED[self.arch]:
            self.faults.append(f"{self.shared} bytes of shared memory, of {SHARED[self.arch]}")

    def line(self) -> str:
        return (
            f"{self.name:52} {self.arch:4} {self.registers:4} {self.stack:5} {self.spills:6} "
            f"{self.shared:6}  load {by_width(self.loads)}, store {by_width(self.stores)}"
        )


def by_width(found: dict[int, int]) -> str:
    return " ".join(f"{width}x{n}" for width, n in sorted(found.items(), reverse=True))


def find_cuobjdump() -> str | None:
    """The disassembler: on the PATH, or in triton's wheel (its nvdisasm refuses CUDA 13)."""
    spec = importlib.util.find_spec("triton")
    bundled = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    found = shutil.which("cuobjdump")
    return found or (str(bundled) if bundled and bundled.exists() else None)


def dump(binary: Path, arch: int | None = None) -> str:
    """Resource usage, then machine code: of a cubin, or of one architecture in a library."""
    choice = [] if arch is None else ["-arch", f"sm_{arch}"]
    command = [find_cuobjdump() or "cuobjdump", *choice, "-res-usage", "-sass", str(binary)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def accesses(sass: str, instruction: str) -> dict[int, int]:
    """How many of ``instruction``, a pattern, there are by width in bits."""
    found: collections.Counter[int] = collections.Counter()
    for modifiers in re.findall(rf"\b{instruction}((?:\.\w+)*)(?!\w)", sass):
        width = next((bits for suffix, bits in WIDTHS.items() if suffix in modifiers), 32)
        found[width] += 1
    return dict(found)


def inspect(binary: Path, arch: int) -> list[CompiledKernel]:
    """Every kernel in a cubin, or for ``arch`` in a library, under its mangled name."""
    text = dump(binary, None if binary.suffix == ".cubin" else arch)
    usage = dict(re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", text))
    parts = re.split(r"^\s*Function : (\S+)", text, flags=re.MULTILINE)
    kernels = []
    for name, sass in zip(parts[1::2], parts[2::2], strict=True):
        numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage[name])}
        kernels.append(
            CompiledKernel(
                name=name,
                arch=arch,
                registers=numbers["REG"],
                stack=numbers["STACK"],
                shared=numbers["SHARED"],
                spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
                fused=len(re.findall(r"\b(?:FFMA|DFMA)\b", sass)),
                loads=accesses(sass, "LDG(?:STS)?"),
                stores=accesses(sass, "STG"),
                products=dict(collections.Counter(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", sass))),
            )
        )
    return kernels
