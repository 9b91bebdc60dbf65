"""What the benchmarks of whole image encoders share: experts of open_clip's sizes, and the checks.

Times are per image: 1000 / ms_q50 is images/s. The operations are those of products in the layers,
counted by torch. The features of the first images are checked; tests compare all.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from neulig_fast import ExpertPool, testing
from neulig_fast.encoders import Replay

from . import harness, machine, selection, timing
from .harness import Case, Provider
from .session import DTYPES
from .towers import TOY, TOY_RN, image_tower

SHAPES, EXPERTS, BATCHES = ("ViT-B-32", "ViT-L-14", "RN50"), (2, 5, 8), (1, 8, 32, 128)
_TOYS: dict[str, dict[str, Any]] = {"toy ViT": TOY, "toy RN": TOY_RN}
_CHECKED = 2  # images, each through a model of its own in fp64
_SPREAD = 0.02  # of the experts' values

State = dict[str, Tensor]


class Setting(NamedTuple):
    """One size: an open_clip model, N, B and a dtype."""

    shape: str
    experts: int
    batch: int
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The experts, images (B, 3, H, W) and coefficients (B, N)."""

    pool: ExpertPool
    template: nn.Module
    images: Tensor
    coef: Tensor

    def run(self, state: State, images: Tensor) -> Tensor:
        """(B, D): the published way to run a model with other tensors."""
        return functional_call(self.template, state, (images,))

    def states(self) -> list[State]:
        return [self.pool.state_dict(i) for i in range(self.pool.num_experts)]


def inputs(setting: Setting, device: str) -> Inputs | None:
    """Experts that differ slightly from a randomly initialised tower, in the pool's memory.

    None, and a sentence, where they would not fit.
    """
    embed, vision = 8, _TOYS.get(setting.shape)
    if vision is None:
        import open_clip

        config = open_clip.get_model_config(setting.shape)
        embed, vision = config["embed_dim"], config["vision_cfg"]
    template = image_tower(embed, vision, 0, "cpu")
    size = sum(t.numel() for t in template.state_dict().values()) * setting.dtype.itemsize
    if setting.experts * size > machine.memory(device):
        harness.say(f"{setting.shape} N={setting.experts} skipped: not enough memory for experts")
        return None
    g = torch.Generator().manual_seed(9)

    def near(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        return tensor + _SPREAD * torch.randn(tensor.shape, generator=g) * tensor.abs().mean()

    states: list[State] = [
        {name: near(tensor) for name, tensor in template.state_dict().items()}
        for _ in range(setting.experts)
    ]
    pool = ExpertPool(states, template, dtype=setting.dtype, device=device, consume=True)
    side = vision["image_size"]
    images = torch.randn(setting.batch, 3, side, side, generator=g).to(device, setting.dtype)
    coef = torch.randn(setting.batch, setting.experts, generator=g).softmax(1).to(device)
    return Inputs(pool, template.to(device, setting.dtype), images, coef)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In ``dtype``, unless it counts."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def replayed(
    given: Inputs, forward: Callable[..., Tensor], *tensors: Tensor
) -> dict[str, Callable[[], Tensor]]:
    """Ours from a CUDA graph, on a GPU."""
    if not given.images.is_cuda:
        return {}
    return {"neulig_fast, CUDA graph": functools.partial(Replay(given.pool, forward), *tensors)}


# -- which cases ----------------------------------------------------------------------------------


def settings(
    device: str,
    quick: bool,
    shapes: Sequence[str] = SHAPES,
    experts: Sequence[int] = EXPERTS,
    batches: Sequence[int] = BATCHES,
    dtypes: Sequence[str] = (),
) -> Iterator[Setting]:
    """What is wanted of the grid; by ``neulig-fast bench``, which names no batch, batches of 8."""
    if quick:
        shapes, experts, batches = tuple(_TOYS), (2,), (3,)
    elif not selection.current().full:
        batches = (8,)
        shapes = [name for name in shapes if name in (selection.current().shapes or ("ViT-B-32",))]
    names = dtypes or (("fp32", "bf16") if device == "cuda" else ("fp32",))
    grid = itertools.product(shapes, experts, batches, [DTYPES[name] for name in names])
    for setting in itertools.starmap(Setting, grid):
        if selection.wanted(setting.shape, setting.dtype, N=setting.experts):
            yield setting


def main(name: str, cases: Callable[..., Iterator[Case]]) -> None:
    """The command line of :func:`harness.main` with a choice of sizes."""
    parser = argparse.ArgumentParser(description=f"Benchmark {name}.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES)
    parser.add_argument("--experts", nargs="+", type=int, default=EXPERTS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=(), help="cpu: fp32")
    harness.main(name, cases, parser)


# -- a case ---------------------------------------------------------------------------------------


def case(
    op: str,
    setting: Setting,
    given: Inputs,
    providers: dict[str, Callable[[], Tensor]],
    expected: Callable[[torch.dtype, int], Tensor],
    models: int,
) -> Case:
    """One setting.

    Args:
        providers: by name, ours beginning with neulig_fast; each gives (..., B, D).
        expected: the features of the first images, (..., count, D), computed in a given dtype.
        models: how many models every image goes through.
    """
    B = setting.batch

    @torch.no_grad()
    def check(result: Tensor) -> None:
        count = min(_CHECKED, B)
        working, oracle = expected(setting.dtype, count), expected(torch.float64, count)
        testing.assert_within_rule(result[..., :count, :], working, oracle, _products(given.pool))

    device = given.images.device.type
    one = functools.partial(given.run, given.pool.state_dict(0), given.images[:1])
    with torch.no_grad():
        _, peak = timing.with_peak(one, device)
        with FlopCounterMode(display=False) as counted:
            one()
    needs = round(1e6 * peak) * B * models
    found = [
        Provider(
            label,
            torch.no_grad()(run),
            "ours" if label.startswith("neulig_fast") else "theirs",
            steps=B,
            needs=needs,
        )
        for label, run in providers.items()
    ]
    return Case(
        op=op,
        mode=f"batch {B}",
        shape=setting.shape,
        dtype=setting.dtype,
        device=device,
        threads=machine.cores(),
        providers=found,
        check=check,
        flops=models * counted.get_total_flops(),
        resident=given.pool.params.nbytes,
        numbers={"N": setting.experts},
    )


def _products(pool: ExpertPool) -> int:
    """How many products lie one behind the other on a way through the network."""
    return sum(segment.length // segment.shape[0] for segment in pool.segments if segment.shape[1:])
