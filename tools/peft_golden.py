"""What peft makes of small adapters and task vectors: the files in tests/data/peft.

    python tools/peft_golden.py          # in an environment with peft 0.21.2

``base-DTYPE.safetensors`` are the models, ``CASE/`` the adapters as peft writes them, and
``CASE/merged-DTYPE.safetensors`` what ``merge_and_unload`` gives. ``merges.safetensors`` has, for
the cases of ``merges.yml``, the task vectors, which elements were drawn, and the result of the
function of ``peft.utils.merge_utils``. peft draws with torch's generator and neulig_fast by places:
to compare the rest, peft is given the draws of neulig_fast.
"""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DATA = Path(__file__).resolve().parents[1] / "tests/data/peft"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = [0.5, -0.3, 1.2]
SHAPES = {"a.weight": (7, 9), "b.bias": (23,), "c.bias": (5,)}
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q", "conv", "point"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q", "head"],
        "rank_pattern": {"q": 2},
        "alpha_pattern": {"he.d": 7},
    },
    "rslora": {"r": 3, "lora_alpha": 6, "target_modules": ["q"], "use_rslora": True},
    "more": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": ["embed_tokens", "q"],
        "modules_to_save": ["head"],
        "bias": "all",
    },
    "turned": {"r": 2, "lora_alpha": 3, "target_modules": ["turned"], "fan_in_fan_out": True},
}


def peft_module(name: str) -> Any:
    """A part of peft. Where this project's root is on the path, transformers takes its folder of
    kernels for a package."""
    import importlib

    here = [path for path in sys.path if not (Path(path) / "kernels/_launch.py").exists()]
    with mock.patch.object(sys, "path", here):
        return importlib.import_module(name)


# -- adapters -------------------------------------------------------------------------------------


def network() -> nn.Module:
    """One of every layer that adapters are for."""
    conv1d = peft_module("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        "embed_tokens": nn.Embedding(11, 6),
        "q": nn.Linear(6, 8),
        "head": nn.Linear(8, 3),
        "turned": conv1d(5, 8),
        "norm": nn.LayerNorm(8),
        "conv": nn.Conv2d(3, 4, 3),
        "point": nn.Conv2d(4, 5, 1),
    }
    return nn.ModuleDict(layers)


def write_adapters() -> None:
    """Each on the model in fp32 and in bf16; the factors are fp32, as in files of peft."""
    peft = peft_module("peft")
    net = network()
    for name, dtype in DTYPES.items():
        save_file(copy.deepcopy(net).to(dtype).state_dict(), DATA / f"base-{name}.safetensors")
    for case, settings in ADAPTERS.items():
        shutil.rmtree(DATA / case, ignore_errors=True)
        trained = peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**settings))
        torch.manual_seed(1)
        for p in trained.parameters():
            if p.requires_grad:
                p.data.normal_()
        trained.save_pretrained(DATA / case)
        (DATA / case / "README.md").unlink()
        for name, dtype in DTYPES.items():
            own = copy.deepcopy(net).to(dtype)
            model = peft.PeftModel.from_pretrained(own, DATA / case).merge_and_unload()
            state = {key: t.contiguous() for key, t in model.state_dict().items()}
            save_file(state, DATA / case / f"merged-{name}.safetensors")


# -- merges of task vectors -----------------------------------------------------------------------


def task_vectors(name: str) -> list[Tensor]:
    """Of three experts. Some elements are zero, some sums are, and signs that many have lose to
    the sum's. The last tensor has an infinity in its last element."""
    g = torch.Generator().manual_seed(sum(name.encode()))
    d = torch.randn(3, *SHAPES[name], generator=g).bfloat16().float()
    flat = d.view(3, -1)
    flat[:, 0] = 0
    flat[:, 1] = torch.tensor([1.5, -1.5, 0.0])
    flat[:, 2] = torch.tensor([2.0, -1.75, -1.5])
    flat[:, 3] = torch.tensor([3.0, -1.25, -1.25])
    if name == "c.bias":
        flat[:, 4] = torch.tensor([torch.inf, -2.5, -2.5])
    return list(d)


def drawn(density: float) -> dict[str, list[Tensor]]:
    """By tensor and expert, 1 where neulig_fast keeps an element: a merge of ones onto zeros."""
    import neulig_fast as nf

    found: dict[str, list[Tensor]] = {name: [] for name in SHAPES}
    with tempfile.TemporaryDirectory() as text:
        root = Path(text)
        models = [str(root / f"m{i}.safetensors") for i in range(3)]
        ones = {name: torch.ones(shape) for name, shape in SHAPES.items()}
        save_file({name: torch.zeros_like(t) for name, t in ones.items()}, root / "b.safetensors")
        for model in models:
            save_file(ones, model)
        for i in range(3):
            experts = [
                {"model": m, "parameters": {"weight": float(i == k)}} for k, m in enumerate(models)
            ]
            config = {"merge_method": "dare_linear", "base_model": str(root / "b.safetensors")}
            config |= {"models": experts, "parameters": {"density": density, "rescale": False}}
            nf.merge(config, root / f"out{i}")
            for name, mask in load_file(root / f"out{i}/model.safetensors").items():
                found[name].append(mask)
    return found


def write_merges() -> None:
    """Task vectors in fp32, which bf16 holds too, and results of every case in both."""
    functions = peft_module("peft.utils.merge_utils")
    vectors = {name: task_vectors(name) for name in SHAPES}
    state = {f"{n}/{i}": d for n, each in vectors.items() for i, d in enumerate(each)}
    for case, entry in yaml.safe_load((DATA / "merges.yml").read_text()).items():
        options = dict(entry["peft"])
        function = getattr(functions, options.pop("function"))
        masks: dict[str, list[Tensor]] = {name: [] for name in SHAPES}
        if "dare" in case:
            masks = drawn(options["density"])
            state |= {
                f"{case}/{n}/{i}/drawn": m.bool() for n in SHAPES for i, m in enumerate(masks[n])
            }
        for tensor, each in vectors.items():
            for name, dtype in DTYPES.items():
                left = iter(masks[tensor])
                with mock.patch.object(torch, "bernoulli", lambda p, left=left: next(left).to(p)):
                    merged = function([d.to(dtype) for d in each], torch.tensor(WEIGHTS), **options)
                state[f"{case}/{tensor}/{name}"] = merged.to(dtype)
    save_file(state, DATA / "merges.safetensors")


def main() -> None:
    write_adapters()
    write_merges()


if __name__ == "__main__":
    main()
