"""FusionBench: AdaMerging, WE-MoE and merges of five task vectors."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from neulig_fast import testing

from .. import dropins
from ..shapes import TOY, VIT_B_32, Shape
from . import Case

_EXPERTS = 5
_SPREAD = 0.01  # of task vectors; a base's values are standard normal
_STEPS = 10  # of WUDI's 300
_METHOD = "fusion_bench.method"
_TIES = f"{_METHOD}.ties_merging.ties_merging_utils"
_EMR = f"{_METHOD}.emr_merging.utils:emr_merge"
_TALL = f"{_METHOD}.tall_mask.utils:generate_task_masks"
_DARE = f"{_METHOD}.dare.utils:param_random_drop_"
_WUDI = f"{_METHOD}.wudi.wudi:wudi_merging"
_REGMEAN = f"{_METHOD}.regmean.regmean:merging_with_regmean_weights"
_READER = "fusion_bench.utils.lazy_state_dict:LazyStateDict._load_tensor_from_checkpoint_file"
_STATISTICS = f"{_METHOD}.regmean.clip_regmean:RegMeanAlgorithmForCLIP.get_regmean_weights"


def looked_up(seam: str) -> Callable[..., Any]:
    """A function where it is now."""
    where, name = seam.split(":")
    return getattr(importlib.import_module(where), name)


def states(shape: Shape) -> list[dict[str, Tensor]]:
    """A base and five models."""
    g = torch.Generator().manual_seed(0)
    base = {name: torch.randn(size, generator=g) for name, size in shape.tensors()}
    models = [
        {name: x + _SPREAD * torch.randn(x.shape, generator=g) for name, x in base.items()}
        for _ in range(_EXPERTS)
    ]
    return [base, *models]


def rows(width: int) -> Tensor:
    """Five task vectors of whole models."""
    return _SPREAD * torch.randn(_EXPERTS, width, generator=torch.Generator().manual_seed(1))


def silent(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same, without bars and remarks."""

    def silenced() -> Any:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return call()

    return silenced


def module(state: dict[str, Tensor]) -> nn.Module:
    """With these parameters, and no forward."""
    return nn.ParameterList(state.values())


def merged_model(kind: str, shape: Shape) -> Any:
    """One of FusionBench's two, of "layer" or "task"."""
    base, *models = map(module, states(shape))
    tensors = len(list(base.parameters()))
    weights = torch.full((_EXPERTS, tensors) if kind == "layer" else (_EXPERTS,), 0.3)
    wrapper = importlib.import_module(f"fusion_bench.models.wrappers.{kind}_wise_fusion")
    return getattr(wrapper, f"{kind.title()}WiseMergedModel")(weights, base, models)


def step(shape: Shape) -> Callable[[], Any]:
    """What a step of AdaMerging does but for the model: a merge, and back to its weights."""
    made = merged_model("layer", shape)
    grads = [_SPREAD * torch.ones_like(x) for x in made.pretrained_model.parameters()]

    def call() -> list[Tensor]:
        made.merge_weight.grad = None
        merged = list(made.merge_weights().values())
        torch.autograd.backward(merged, grads)
        return [made.merge_weight.grad, *merged]

    return call


def merge(shape: Shape) -> Callable[[], Any]:
    """A merge alone, with one weight per model."""
    made = merged_model("task", shape)

    @torch.no_grad()
    def call() -> list[Tensor]:
        return list(made.merge_weights().values())

    return call


def experts(samples: int, tokens: int, width: int) -> Callable[[], Any]:
    """An MLP of a weight-ensembling mixture of experts, merged for every sample."""
    torch.manual_seed(2)
    body = [
        nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        for _ in range(1 + _EXPERTS)
    ]
    kind = importlib.import_module("fusion_bench.models.we_moe").WeightEnsemblingMoE
    made, x = kind(width, body[0], body[1:], batch_first=True), torch.randn(samples, tokens, width)

    @torch.no_grad()
    def call() -> Tensor:
        return made(x)

    return call


def on_rows(function: str, args: tuple[Any, ...], width: int) -> Callable[[], Any]:
    given = rows(width)
    return silent(lambda: looked_up(function)(given, *args))


def on_states(function: str, args: tuple[Any, ...], shape: Shape) -> Callable[[], Any]:
    given = states(shape)[1:]
    return lambda: looked_up(function)(given, *args)


def wudi(width: int) -> Callable[[], Any]:
    g = torch.Generator().manual_seed(3)
    sizes = {"in": (4 * width, width), "out": (width, 4 * width), "qkv": (3 * width, width)}
    vectors = [
        {name: _SPREAD * torch.randn(size, generator=g) for name, size in sizes.items()}
        for _ in range(_EXPERTS)
    ]
    return silent(lambda: looked_up(_WUDI)(vectors, "cpu", _STEPS))


def emr(shape: Shape) -> Callable[[], Any]:
    given = states(shape)[1:]

    def call() -> list[Tensor]:
        unified, masks, rescalers = looked_up(_EMR)(given)
        return [*unified.values(), *(mask for some in masks.values() for mask in some), rescalers]

    return call


def masks(width: int) -> Callable[[], Any]:
    vectors = rows(width)
    base = torch.randn(width, generator=torch.Generator().manual_seed(4))
    args = (vectors, base + vectors, base, vectors.sum(0))
    return silent(lambda: looked_up(_TALL)(*args, 0.4))


def drop(width: int) -> Callable[[], Any]:
    start = 1 + rows(width)[0]

    def call() -> Tensor:
        param = nn.Parameter(start)  # new memory takes its place
        looked_up(_DARE)(param, 0.8, True)
        return param.data

    return call


def regmean(width: int) -> Callable[[], Any]:
    """An MLP's two layers, of five models, by statistics of twice as many rows as columns."""
    g = torch.Generator().manual_seed(5)
    sizes = {"in": (4 * width, width), "out": (width, 4 * width)}
    params = {
        f"{name}.weight": [torch.randn(size, generator=g) for _ in range(_EXPERTS)]
        for name, size in sizes.items()
    }
    statistics = []
    for _ in range(_EXPERTS):
        inputs = {
            name: torch.randn(2 * size[1], size[1], generator=g) for name, size in sizes.items()
        }
        statistics.append({name: x.T @ x / len(x) for name, x in inputs.items()})
    return lambda: looked_up(_REGMEAN)(params, statistics, 0.9)


class _Block(nn.Module):
    """The linear layers of a transformer's block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(width, width))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.o(self.q(x) + self.k(x) + self.v(x))
        return self.down(self.up(mixed).relu())


def statistics(samples: int, tokens: int, width: int) -> Callable[[], Any]:
    """RegMean's statistics of a block's layers, and its forward pass on one batch."""
    torch.manual_seed(6)
    block, batch = _Block(width), torch.randn(samples, tokens, width)
    layers = {name: x for name, x in block.named_modules() if isinstance(x, nn.Linear)}
    fabric = SimpleNamespace(setup=lambda x: x, setup_dataloaders=lambda x: [batch])
    owner = SimpleNamespace(
        fabric=fabric, clip_processor=None, dataloader_kwargs={}, num_regmean_examples=samples,
        compute_logits=lambda model, given, task: model(given),
    )  # fmt: skip
    module = importlib.import_module(_STATISTICS.split(":")[0])

    @torch.no_grad()
    def call() -> Any:
        method = module.RegMeanAlgorithmForCLIP.get_regmean_weights
        return method(owner, "task", block, [0], layers)

    return silent(call)


def reader(shape: Shape) -> Callable[[], Any]:
    """All tensors of a file, one after the other."""
    folder = tempfile.TemporaryDirectory()
    save_file(states(shape)[0], Path(folder.name) / "model.safetensors")
    kind = importlib.import_module(_READER.split(":")[0]).LazyStateDict

    def call() -> list[Tensor]:
        return [1 * tensor for tensor in kind(folder.name).values()]  # read, not promised

    return call


# -- what is compared -----------------------------------------------------------------------------


def check_step(result: Any, expected: list[Tensor]) -> None:
    """The merged tensors to the bit; sums over all of a tensor's elements within the rule."""
    terms = sum(x.numel() for x in expected[1:])
    testing.assert_within_rule(result[0], expected[0], expected[0].double(), terms)
    check_bits(result[1:], expected[1:])


def check_bits(result: Any, expected: list[Tensor]) -> None:
    found = [result] if isinstance(result, Tensor) else list(result)
    if not all(map(torch.equal, found, expected)):
        raise AssertionError("other bits than FusionBench's")


def check_close(result: Any, expected: list[Tensor]) -> None:
    """As far as the original's inverse in fp32 is right."""
    for got, wanted in zip(result.values(), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def check_share(result: Any, expected: list[Tensor]) -> None:
    """Draws are its own: as many are kept, and they have the same scale."""
    share = float((result != 0).float().mean())
    if not abs(share - float((expected[0] != 0).float().mean())) < 0.05:
        raise AssertionError(f"a share of {share} is kept")


def cases() -> Iterator[Case]:
    sizes = (
        (TOY, dropins.TOY, 4096, (3, 4, 16)),
        (VIT_B_32, VIT_B_32.name, 32 << 20, (16, 50, 768)),
    )
    for shape, size, width, samples in sizes:
        made = functools.partial(Case, size=size, host="fusion_bench")
        partial = functools.partial
        # FusionBench makes so many copies of such rows that these are fewer elements.
        flat = partial(made, size=size if shape is TOY else f"{width >> 20} M elements")
        where = "fusion_bench.models.wrappers"
        layer = f"{where}.layer_wise_fusion:LayerWiseMergedModel.merge_weights"
        yield made(layer, make=partial(step, shape), check=check_step)
        task = f"{where}.task_wise_fusion:TaskWiseMergedModel.merge_weights"
        yield made(task, make=partial(merge, shape), check=check_bits)
        where = "fusion_bench.models.we_moe:WeightEnsemblingMoE.forward"
        yield made(where, make=partial(experts, *samples), terms=samples[2] * 4)
        where = f"{_TIES}:ties_merging"
        yield flat(where, make=partial(on_rows, where, (20, "mean"), width), check=check_bits)
        for name, args in (("avg", ()), ("weighted_sum", ([0.3] * _EXPERTS,))):
            where = f"fusion_bench.utils.state_dict_arithmetic:state_dict_{name}"
            yield made(where, make=partial(on_states, where, args, shape))
        yield made(_EMR, make=partial(emr, shape), check=check_bits)
        yield made(_WUDI, make=partial(wudi, samples[2]), terms=4 * samples[2])
        yield made(_REGMEAN, make=partial(regmean, samples[2]), check=check_close)
        yield made(_READER, make=partial(reader, shape), check=check_bits)
        yield made(_STATISTICS, make=partial(statistics, *samples), terms=samples[0] * samples[1])
        yield flat(_TALL, make=partial(masks, width), check=check_bits)
        yield flat(_DARE, make=partial(drop, width), check=check_share)


CASES = tuple(cases())
