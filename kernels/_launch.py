"""Triton or its absence, and how kernels are launched: the one place that chooses block sizes
of kernels over an arena (_tiles.py chooses those of layers)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class _Absent:
    """Stands in for triton: kernel modules can be imported, and a launch says what is missing."""

    def __getattr__(self, name: str) -> Any:
        return _Absent()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Absent()

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError(MISSING)


triton: Any
tl: Any
MISSING: str | None = None
try:
    import triton
    import triton.language as tl
except ImportError as error:  # CPU wheels of torch come without triton
    triton, tl = _Absent(), _Absent()
    MISSING = f"triton cannot be imported: {error}"

# Decided, like what @triton.jit makes of a kernel, when this package is imported.
INTERPRETED = MISSING is None and bool(triton.knobs.runtime.interpret)

MAX_EXPERTS = 64
RECORDED = 32  # launches of a CUDA graph, about: enough that a replay's own cost is a small share
# All registers a thread can have. Unless told, ptxas spills to reach an occupancy of its own
# choice: 2 spills at 56 registers in blend for sm_100.
REGISTERS = 255
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Config:
    """How a kernel is cut into programs.

    ``block`` columns of a program, ``num_warps``, ``held`` rows (experts; of blend_weight_grad:
    gradients) at once. Kernels that walk through their block take ``lanes`` columns at a time and
    keep sums for ``experts`` experts. With ``stages`` > 1, loads run that many steps ahead, through
    shared memory. Programs of NeuLig's loss hold ``held`` samples of ``experts`` experts, padded to
    a power of two, and take ``block`` columns or ``lanes`` classes at a time.
    """

    block: int
    num_warps: int
    held: int
    lanes: int = 0
    experts: int = 0
    stages: int = 1


def config(
    op: str, dtype: torch.dtype, experts: int, outputs: int, *, seeded: bool = False
) -> Config:
    """The configuration of ``op`` for N experts and K outputs: a pure function of its arguments.

    ``seeded``: a blend that rounds stochastically.

    Raises:
        ValueError: an op that has no kernel here.
    """
    registers = 2 if dtype == torch.float64 else 1  # per value
    if op == "blend":
        return _blend(dtype.itemsize, registers, experts, outputs, seeded)
    if op == "blend_lists":  # as blend, but 16 columns a thread of more than 5 experts would spill
        return _blend(dtype.itemsize if experts <= 5 else 4, registers, experts, 1, False)
    if op == "lerp_lists":
        return _blend(dtype.itemsize, registers, 2, 1, True)
    if op == "blend_lists_weight_grad":
        groups = -(-experts // 6)  # more at once would leave room for few programs
        return Config(block=1024 // registers, num_warps=4, held=-(-experts // groups))
    if op == "blend_weight_grad":
        return _blend_weight_grad(registers, experts, outputs)
    if op == "blend_telemetry":
        held = next(h for h in (experts, 5, 4, 3, 2, 1) if h <= 7 and experts % h == 0)
        columns = 1024 if held < 7 else 512  # more of either would spill
        return Config(block=columns // registers, num_warps=4, held=held)
    if op == "merge_task_vectors":  # more experts than 8 in groups, read again for an election
        held = next(h for h in range(8, 0, -1) if experts % h == 0)
        return Config(block=128 * 16 // dtype.itemsize, num_warps=4, held=held)
    if op == "offset_gram":
        return _offset_gram(dtype.itemsize, experts)
    if op == "gram":  # a product for each pair of rows: at most 16 sums
        return Config(block=8192, num_warps=4, held=min(experts, 4), lanes=512 // registers)
    if op == "magnitude_sums":
        return Config(block=8192, num_warps=4, held=1, lanes=1024 // registers)
    if op == "magnitude_histogram":
        return Config(block=16384, num_warps=8, held=1, lanes=2048)  # in 4 warps some spill
    if op == "magnitude_select":
        return Config(block=4096, num_warps=4, held=1, lanes=1024)
    if op in ("neulig_fit", "neulig_loss", "neulig_loss_backward"):
        return _neulig(registers, experts)
    raise ValueError(f"config: {op!r} has no kernel")


def _neulig(registers: int, experts: int) -> Config:
    """One sample per program, so that a batch of 128 fills a GPU. From 9 experts on, of whose N
    times N D weights every program reads all, as many as leave registers for both.

    At most 16 registers a thread hold its part of the sums. In the interpreter, where a program
    costs milliseconds whatever it holds, more samples share one.
    """
    padded = 1 << (experts - 1).bit_length()
    held = {16: 4, 32: 2}.get(padded, 1)
    columns = min(4096 // registers**2 // (padded * held), 1024)
    lanes = min(columns, 128)
    return Config(columns, 8, 16 if INTERPRETED else held, lanes, padded)


def _blend(itemsize: int, registers: int, experts: int, outputs: int, seeded: bool) -> Config:
    """Two 16-byte loads per thread and expert, one in fp8 and, to save registers, in 2-byte types
    for many rows. Stochastic rounding, which takes registers too, halves that.

    With one output, experts beyond eight stream by in eights. With several, all experts of a column
    are held, so that each is read once: the more experts, the fewer columns per thread, for at most
    128 registers of values.
    """
    columns = 8 // registers
    if itemsize == 1 or (itemsize == 2 and experts <= (8 if outputs == 1 else 4)):
        columns = 16
    if seeded:
        columns //= 2
    held = (experts - 1) % 8 + 1
    if outputs > 1:
        held = experts
        while experts * columns * registers > 128:
            columns //= 2
    return Config(block=128 * columns, num_warps=4, held=held)


def _blend_weight_grad(registers: int, experts: int, outputs: int) -> Config:
    """Sums of up to 8 gradients with up to 8 experts, a register or two a thread each.

    Several gradients: half the columns at once, or sums and columns together leave room for fewer
    programs; longer programs, because at its end a program adds each sum over its threads; and
    loads that do not wait for arithmetic.
    """
    lanes = (1024 if outputs == 1 else 512) // registers
    held = min(outputs, 8)
    groups = -(-experts // min(8, 64 // registers // held))
    block = 8 * lanes if outputs == 1 else 16384
    stages = 3 if outputs > 1 and registers == 1 else 1  # of fp64, some would spill
    return Config(block, 4, held, lanes, experts=-(-experts // groups), stages=stages)


def _offset_gram(itemsize: int, experts: int) -> Config:
    """All of up to 16 experts at once, as many columns a thread as their sums leave registers for:
    loads of 16 bytes up to 9. More, and fp64 from 10 on, in groups of 4, whose columns stay in
    cache.

    Where sums leave room for few programs, from 8 experts on, loads do not wait for arithmetic.
    """
    if experts <= 9:
        stages = 3 if experts >= 8 and itemsize < 8 else 1
        return Config(16384, 4, max(experts - 1, 1), 16 // itemsize, stages=stages)
    if experts > 16 or itemsize == 8:
        return Config(4096, 4, held=4, lanes=16 // itemsize)
    if itemsize == 4:  # from 12 on two columns spill or, staged for sm_100, crash triton 3.6's LLVM
        return Config(16384, 4, experts - 1, lanes=2 if experts <= 11 else 1, stages=3)
    if experts <= 13:
        return Config(16384, 4, experts - 1, lanes=4 if experts <= 12 else 2, stages=3)
    return Config(16384, 4, experts - 1, lanes=1)  # two bytes are too few for shared memory


@dataclass(frozen=True)
class Launch:
    """A kernel, how many programs of it, its arguments, its constants and compiler options."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: Mapping[str, Any]


def run(params: torch.Tensor, launches: Iterable[Launch]) -> None:
    """Launch one after the other on the device of ``params`` and its current stream."""
    with torch.cuda.device_of(params):
        for launch in launches:
            launch.kernel[(launch.programs,)](*launch.arguments, **launch.options)


def repeat(params: torch.Tensor, launches: Sequence[Launch], times: int) -> None:
    """Launch all of them ``times`` times over, on a GPU mostly from a CUDA graph.

    From Python a launch takes longer than a small kernel runs. The first times are direct: they
    compile, which a recording cannot. Kernels must find by themselves which time it is. Within a
    recording of somebody else's all launches are direct.
    """
    direct, replays, once = times, 0, max(1, RECORDED // len(launches))
    if params.is_cuda and not torch.cuda.is_current_stream_capturing():
        direct = (times - 1) % once + 1
        replays = (times - direct) // once
    for _ in range(direct):
        run(params, launches)
    if replays:
        with torch.cuda.device_of(params):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(torch.cuda.Stream()):  # the default stream cannot be recorded
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    for _ in range(once):
                        run(params, launches)
                finally:
                    graph.capture_end()
            for _ in range(replays):
                graph.replay()


def missing(device: str) -> str | None:
    """Why no kernel can run on ``device`` at all; None when they can."""
    if MISSING is not None:
        return MISSING
    if device != "cuda" and not INTERPRETED:
        return "for cuda tensors (others under TRITON_INTERPRET=1)"
    return None


def why_not_arena(
    params: torch.Tensor, segments: torch.Tensor | None, *, bytes_: bool = False
) -> str | None:
    """Why a kernel cannot read ``params`` (N, P) with ``segments`` (S + 1,); None when it can."""
    if (reason := missing(params.device.type)) is not None:
        return reason
    if params.dtype not in DTYPES and not bytes_:
        return f"params are {params.dtype}, not fp32, bf16, fp16 or fp64"
    if params.shape[0] > MAX_EXPERTS:
        return f"{params.shape[0]} experts, more than {MAX_EXPERTS}"
    if params.shape[1] > 1 and params.stride(1) != 1:
        return f"params' columns are not contiguous (stride {params.stride(1)})"
    if segments is not None and segments.numel() < 2 and params.shape[1] > 0:
        return f"segments have no segment for {params.shape[1]} columns"
    return None


def why_not_layer(weight: torch.Tensor, **others: torch.Tensor | None) -> str | None:
    """Why a kernel cannot read the tensors of a layer, weight (N, ...); None when it can."""
    if (reason := missing(weight.device.type)) is not None:
        return reason
    if weight.shape[0] > MAX_EXPERTS:
        return f"{weight.shape[0]} experts, more than {MAX_EXPERTS}"
    for name, tensor in {"weight": weight, **others}.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name}'s columns are not contiguous (stride {tensor.stride(-1)})"
    return None


def with_rows(x: torch.Tensor) -> torch.Tensor:
    """x with contiguous columns; a copy of maps (C, H * W) that are read as (H * W, C)."""
    return x if x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous()


def stride(tensor: torch.Tensor, dim: int) -> int:
    """Its stride, and zero where there is nothing to stride to."""
    return tensor.stride(dim) if tensor.shape[dim] > 1 else 0


def require(op: str, reason: str | None) -> None:
    """ValueError if there is a reason why ``op`` cannot run."""
    if reason is not None:
        raise ValueError(f"{op}: {reason}")


def alignment(stride: int) -> int:
    """The largest power of two up to 16 that divides ``stride``: what wide accesses may rely on."""
    return min(stride & -stride, 16) if stride else 16
