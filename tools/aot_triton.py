"""Triton kernels compiled as their launchers launch them, for a GPU that is not there."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import aot_layers
import aot_magnitude
import aot_merge
import aot_moments
import aot_neulig
import torch
from aot_sass import CompiledKernel, find_cuobjdump, inspect

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("float32", "bfloat16", "float16", "float64")
P = 1 << 20

# N, K, S, P. MAIN are main paths: rows a multiple of 16 bytes, up to 8 experts.
MAIN = [(2, 1, 302, P), (3, 4, 302, P), (5, 1, 1, P), (8, 1, 302, P), (8, 4, 302, P)]
OTHERS = [(12, 4, 302, P), (17, 1, 302, P), (64, 1, 302, P), (16, 4, 302, P), (64, 4, 302, P)]
OTHERS += [(5, 1, 302, P + 1), (8, 4, 302, P + 8)]

FEW = [MAIN[2], MAIN[4]]
GROUPED = {"offset_gram": [OTHERS[1]]}  # with more experts than one group, another kernel

# blend from and to other types, and stochastically: params, out, seed.
CONVERSIONS = [
    ("float8_e4m3fn", "bfloat16", None), ("float8_e5m2", "float8_e5m2", None),
    ("float8_e4m3fn", "float8_e4m3fn", 1), ("bfloat16", "float32", None),
    ("bfloat16", "float8_e4m3fn", None), ("float32", "bfloat16", 1), ("float64", "float16", None),
]  # fmt: skip

compiled_kernels: list[Any] = []
hashes: set[str] = set()  # of what was looked at: several cases may share a kernel


def missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None if find_cuobjdump() else "no cuobjdump in triton's wheel or on the PATH"


class NoDevice:
    """The little of a Triton driver that compiling asks for; the device number is the target."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, _device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def kernel_modules() -> dict[str, ModuleType]:
    """The package's kernel files by name, helpers included."""
    stems = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    names = [stem for stem in stems if stem != "__init__"]
    return {name: importlib.import_module(f"neulig_fast.kernels.{name}") for name in names}


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def blend_launches(
    module: ModuleType, dtype: torch.dtype, n: int, k: int, s: int, p: int,
    out_dtype: torch.dtype | None = None, seed: int | None = None,
) -> Any:  # fmt: skip
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    weights, params = empty(k, s, n, dtype=acc), empty(n, p, dtype=dtype)
    bounds, out = empty(s + 1, dtype=torch.int64), empty(k, p, dtype=out_dtype or dtype)
    launch = module.config("blend", dtype, n, k, seeded=seed is not None)
    return module.launches(out, weights, params, bounds, seed, launch)


def weight_grad_launches(
    module: ModuleType, dtype: torch.dtype, n: int, k: int, s: int, p: int
) -> Any:
    acc = torch.promote_types(dtype, torch.float32)
    launch = module.config("blend_weight_grad", dtype, n, k)
    grad, params = empty(k, p, dtype=dtype), empty(n, p, dtype=dtype)
    partials = empty(k * n, p // launch.block + s, dtype=acc)
    bounds, out = empty(s + 1, dtype=torch.int64), empty(k, s, n, dtype=acc)
    return module.launches(grad, params, bounds, partials, out, launch)


def telemetry_launches(
    module: ModuleType, dtype: torch.dtype, n: int, k: int, s: int, p: int
) -> Any:
    acc = torch.promote_types(dtype, torch.float32)
    launch = module.config("blend_telemetry", dtype, n, k)
    weights, params = empty(k, s, n, dtype=acc), empty(n, p, dtype=dtype)
    bounds, slots = empty(s + 1, dtype=torch.int64), -(-p // launch.block) + s - 1
    squares = empty(n + k, slots, dtype=torch.float64)
    counts = empty(1 + 2 * k, slots, dtype=torch.int32)
    results = (
        empty(k, p, dtype=dtype),
        empty(2, k, s, dtype=torch.int64),
        empty(s, n, dtype=torch.float64),
        empty(k, s, dtype=torch.float64),
        empty(s, dtype=torch.int64),
    )
    return module.launches(weights, params, bounds, None, squares, counts, results, launch)


def offset_gram_launches(
    module: ModuleType, dtype: torch.dtype, n: int, _k: int, s: int, p: int
) -> Any:
    launch, f64 = module.config("offset_gram", dtype, n, 1), torch.float64
    params, bounds = empty(n, p, dtype=dtype), empty(s + 1, dtype=torch.int64)
    sums, gram = empty(s, n, dtype=f64), empty(s, n, n, dtype=f64)
    scratch = module.scratch(params, s, launch)
    return module.launches(params, bounds, *scratch, sums, gram, launch)


def table(n: int, s: int) -> torch.Tensor:
    """The table of the addresses of n lists of s tensors."""
    return empty(s * (n + 3) + 1, dtype=torch.int64)


def list_launches(module: ModuleType, dtype: torch.dtype, n: int, k: int, s: int, p: int) -> Any:
    weights = empty(k, n, dtype=torch.promote_types(dtype, torch.float32))
    launch, outputs = module.config("blend_lists", dtype, n, 1), empty(s, dtype=torch.int64)
    return module.launches(weights, table(n, s), outputs, 0, s, dtype, dtype, launch)


def list_weight_grad_launches(
    module: ModuleType, dtype: torch.dtype, n: int, k: int, s: int, p: int
) -> Any:
    launch = module.config("blend_lists_weight_grad", dtype, n, 1)
    grads = empty(s, dtype=torch.int64)
    partials = empty(n, s, dtype=torch.promote_types(dtype, torch.float32))
    out = empty(s if k > 1 else 1, n, dtype=torch.float64)
    return module.launches(table(n, s), grads, partials, out, dtype, dtype, launch)


def lerp_lists_launches(
    module: ModuleType, dtype: torch.dtype, n: int, k: int, s: int, p: int
) -> Any:
    weight = empty(1, dtype=torch.promote_types(dtype, torch.float32))
    launch, outputs = module.config("lerp_lists", dtype, 2, 1), empty(s, dtype=torch.int64)
    seed = None if k > 1 else 1
    return module.launches(weight, table(2, s), outputs, 0, s, dtype, seed, 0, launch)


CALLS = {
    "blend": blend_launches,
    "blend_lists": list_launches,
    "blend_lists_weight_grad": list_weight_grad_launches,
    "lerp_lists": lerp_lists_launches,
    "blend_telemetry": telemetry_launches,
    "blend_weight_grad": weight_grad_launches,
    "offset_gram": offset_gram_launches,
    **aot_magnitude.CALLS,
    **aot_neulig.CALLS,
}


def compile_all(arch: int, dtypes: Sequence[str], few: bool = False) -> list[CompiledKernel]:
    """Every launch of every kernel file for one architecture; ``few``: of two cases only."""
    from triton.runtime import driver

    driver.set_active(NoDevice(arch))
    modules = kernel_modules()
    kernels = [
        kernel
        for name, module in modules.items()
        if name in CALLS
        for dtype, case in itertools.product(
            dtypes, FEW + GROUPED.get(name, []) if few else MAIN + OTHERS
        )
        for kernel in compile_case(name, module, dtype, case, arch)
    ]
    cases = MAIN[:1] if few else (MAIN[0], MAIN[-1], OTHERS[0])
    for (dtype, out, seed), case in itertools.product(CONVERSIONS, cases):
        conversion = getattr(torch, out), seed
        kernels += compile_case("blend", modules["blend"], dtype, case, arch, *conversion)
    for case_name, launch, check in itertools.chain(
        *(part.cases(modules, dtypes, few) for part in (aot_layers, aot_merge, aot_moments))
    ):
        if (kernel := compile_launch(launch, arch)) is not None:
            kernel.name += f" {case_name}"
            check(kernel)
            kernels.append(kernel)
    return kernels


def compile_launch(launch: Any, arch: int) -> CompiledKernel | None:
    """What a launch is compiled to, under its kernel's name; None if that was looked at before."""
    compiled = launch.kernel.warmup(*launch.arguments, grid=(launch.programs,), **launch.options)
    if compiled.hash in hashes:
        return None
    hashes.add(compiled.hash)
    compiled_kernels.append(launch.kernel)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        (kernel,) = inspect(Path(file.name), arch)
    kernel.name = launch.kernel.__name__.removesuffix("_kernel")
    kernel.shared = compiled.metadata.shared  # the cubin knows only what is not dynamic
    kernel.check_fits(compiled.metadata.num_warps)
    return kernel


def compile_case(
    name: str, module: ModuleType, dtype: str, case: tuple[int, ...], arch: int, *conversion: Any
) -> Iterator[CompiledKernel]:
    n, k, s, p = case
    for launch in CALLS[name](module, getattr(torch, dtype), *case, *conversion):
        if (kernel := compile_launch(launch, arch)) is None:
            continue
        title = kernel.name
        kernel.name = f"{title} {dtype} N{n} K{k} S{s}" + ("" if p == P else f" P+{p - P}")
        if conversion:
            kernel.name += f" to {conversion[0]}".replace("torch.", "") + " seeded" * bool(
                conversion[1]
            )
        if name in ("blend", "blend_lists"):
            main = case in MAIN and not (conversion and conversion[1])
            kernel.check_blend(n if main else None, narrow_stores=bool(conversion))
        if name == "offset_gram" and case in MAIN and "partial" in title:
            kernel.check_loads(n)
        yield kernel


def complaints() -> list[str]:
    """Kernel files without a case here, and jitted functions that no compiled kernel reaches."""
    from triton.runtime.jit import JITFunction

    modules = kernel_modules()
    called = {*CALLS, *aot_layers.CALLED, *aot_merge.CALLED, *aot_moments.CALLED}
    found = [f"kernels/{m}.py has no case in {Path(__file__).name}" for m in modules
             if m[0] != "_" and m not in called]  # fmt: skip
    jitted = {
        value
        for module in modules.values()
        for value in vars(module).values()
        if isinstance(value, JITFunction) and value.__module__ == module.__name__
    }
    for function in sorted(jitted - reached(compiled_kernels), key=lambda f: f.__name__):
        found.append(f"{function.__module__}.{function.__name__} is reached by no kernel")
    return found


def reached(kernels: Sequence[Any]) -> set[Any]:
    """The kernels and every jitted function they name, directly or not."""
    from triton.runtime.jit import JITFunction

    seen: set[Any] = set()
    waiting = list(kernels)
    while waiting:
        function = waiting.pop()
        if function in seen:
            continue
        seen.add(function)
        names = {n.id for n in ast.walk(function.parse()) if isinstance(n, ast.Name)}
        globals_ = function.fn.__globals__
        waiting += [globals_[n] for n in names if isinstance(globals_.get(n), JITFunction)]
    return seen
