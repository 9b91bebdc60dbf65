"""Whole merges on a GPU beside the same on the CPU: run by `make test-gpu`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import neulig_fast as nf
from neulig_fast.methods import BLOCK, METHODS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="merging on a GPU needs one")

SHAPES = {"rows": (70, 1000), "long": (3 * BLOCK + 5,), "one": (1,), "none": (0, 4)}
# Sums over whole tensors may round otherwise there, and exponentials too.
SUMS = {"della", "della_linear", "pcb", "slerp", "nuslerp", "multislerp", "karcher", "model_stock"}
SUMS |= {"emr", "ramplus_tl", "arcee_fusion"}
VALUES = {"weight": 0.5, "scale": 1.5, "t": 0.3, "decay": 0.5, "fisher": "b.safetensors"}
VALUES |= {"density": 0.5, "gamma": 0.1, "select_topk": 0.5, "alpha": 0.3, "epsilon": 0.2}
OURS: dict[str, dict[str, Any]] = {"pcb": {"scope": "tensor"}}
OURS |= {key: {"parity": "paper"} for key in ("dare_linear", "dare_ties")}


def recipe(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Of three models, or as many as the method takes, which are written here."""
    g = torch.Generator().manual_seed(7)
    method = METHODS[name]
    base = {key: torch.randn(shape, generator=g) for key, shape in SHAPES.items()}
    models = [
        {key: (t + 0.1 * torch.randn(t.shape, generator=g)).to(dtype) for key, t in base.items()}
        for _ in range(3)
    ]
    save_file({key: t.to(dtype) for key, t in base.items()}, "b.safetensors")
    for i, state in enumerate(models):
        save_file(state, f"m{i}.safetensors")
    count = min(method.most or 3, 3)
    return {
        "merge_method": name,
        "models": [{"model": f"m{i}.safetensors"} for i in range(count)],
        "base_model": "b.safetensors",
        "parameters": {key: VALUES[key] for key in method.parameters if key in VALUES},
        "neulig_fast": OURS.get(name, {}),
    }


def merged(config: dict[str, Any], out: str, device: str, **how: Any) -> dict[str, torch.Tensor]:
    nf.merge(config, out, device=device, resume=False, **how)
    return load_file(f"{out}/model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"neulig"}))
def test_a_gpu_merges_as_the_cpu_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype
) -> None:
    monkeypatch.chdir(tmp_path)
    config = recipe(name, dtype)
    wanted = merged(config, "cpu", "cpu")
    for out, how in (("gpu", {}), ("small", {"max_vram": "64M", "threads": 2})):
        got = merged(config, out, "cuda:0", **how)
        assert got.keys() == wanted.keys()
        for key, tensor in wanted.items():
            if name not in SUMS:
                assert torch.equal(got[key], tensor), (out, key)
                continue
            near = torch.isclose(got[key].double(), tensor.double(), rtol=2**-7, atol=1e-5)
            # A sum that rounds otherwise may move a threshold past an element.
            assert int((~near).sum()) <= tensor.numel() // 1000, (out, key)


def test_more_than_the_gpu_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = recipe("linear", torch.float32)
    with pytest.raises(ValueError, match=r"max_vram is .*, cuda:0 has"):
        nf.merge(config, "out", device="cuda:0", max_vram="9000G")
    assert not Path("out").exists()
