"""The calls of the layers' kernels that aot_triton.py compiles: every tile, in every type."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from aot_sass import CompiledKernel

CALLED = ("expert_layer_norm", "expert_linear", "mixture_layer_norm", "mixture_linear")
EXPERTS = 5
# Samples, rows of each, outputs and inputs. MAIN are main paths: every tile, of rows that wide
# accesses divide. OTHERS: a patch embedding, a head, sizes that divide nothing.
MAIN = [(32, 50, 3072, 1024), (32, 50, 64, 768), (4, 16, 3072, 768), (4, 16, 64, 768)]
MAIN += [(16, 1, 768, 3072)]
OTHERS = [(32, 256, 1024, 588), (128, 1, 10, 512), (3, 5, 17, 33)]
ACTIVATIONS = ("gelu", None, "quick_gelu", "relu", "gelu_tanh")
# Groups, rows of each, values of a row; of mixtures and of experts.
MIXED_ROWS = [(32, 50, 768), (32, 1, 768), (32, 257, 1024), (2, 3, 7), (2, 9, 4096)]
ROWS = [*MIXED_ROWS, (5, 50, 8192)]

Case = tuple[str, Any, Callable[[CompiledKernel], None]]


@contextlib.contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """What torch is told about products of fp32."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def cases(
    modules: Mapping[str, ModuleType], dtypes: Sequence[str], few: bool = False
) -> Iterator[Case]:
    """A name, a launch, and what is asked of its machine code."""
    for dtype in dtypes:
        for precision in ("tf32", "ieee") if dtype == "float32" else ("ieee",):
            with fp32_products(precision):
                yield from linear_cases(modules, dtype, precision == "tf32", few)
        yield from norm_cases(modules, dtype, few)


def linear_cases(
    modules: Mapping[str, ModuleType], name: str, tf32: bool, few: bool
) -> Iterator[Case]:
    dtype, title = getattr(torch, name), "tf32" if tf32 else name
    for index, shape in enumerate(MAIN[::4] if few else MAIN + OTHERS):
        B, T, outs, ins = shape
        arena = torch.empty(EXPERTS, -(-outs * (ins + 1) // 64) * 64, dtype=dtype)
        weight = arena[:, : outs * ins].view(EXPERTS, outs, ins)
        bias = arena[:, outs * ins : outs * (ins + 1)] if shape in MAIN else None
        activation = ACTIVATIONS[index % len(ACTIVATIONS)]
        x, out = torch.empty(B, T, ins, dtype=dtype), torch.empty(B, T, outs, dtype=dtype)
        coef, tensor_cores = torch.empty(B, EXPERTS), tf32 or dtype.itemsize == 2
        rows, results = x.flatten(0, 1), torch.empty(EXPERTS, B * T, outs, dtype=dtype)
        merged = torch.empty(B, outs, ins, dtype=dtype)
        shift = None if bias is None else torch.empty(B, outs)
        for launch in (
            *modules["expert_linear"].launches(rows, weight, bias, activation, results),
            *modules["mixture_linear"].launches(x, weight, bias, coef, activation, out),
            modules["mixture_linear"].merge_launch(weight, bias, coef, merged, shift),
        ):
            tall = launch.options.get("ROWS")
            check = functools.partial(
                check_linear, wide=shape in MAIN, tall=tall if tensor_cores else None
            )
            yield f"{title} {B * T}x{ins}x{outs}", launch, check


def check_linear(kernel: CompiledKernel, wide: bool, tall: int | None) -> None:
    """``tall``: rows of a tile that tensor cores multiply."""
    if wide:
        kernel.check_loads(2)  # a row of each factor, or of two experts
    if tall is not None:
        kernel.check_tensor_cores(tall)


def norm_cases(modules: Mapping[str, ModuleType], name: str, few: bool) -> Iterator[Case]:
    dtype, module = getattr(torch, name), modules["_layer_norm"]
    for mixed, shapes in ((True, MIXED_ROWS), (False, ROWS)):
        for G, R, D in shapes[:1] if few else shapes:
            N = EXPERTS if mixed else G
            coef = torch.empty(G, N) if mixed else None
            gain, x = torch.empty(N, D, dtype=dtype), torch.empty(G, R, D, dtype=dtype)
            kind = "mixture" if mixed else "expert"
            for launch in module.launches(x, gain, gain, coef, 1e-5, x, x, x):
                yield f"{kind} {name} {G}x{R}x{D}", launch, lambda kernel: None
