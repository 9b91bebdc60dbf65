"""The ceiling of a merge's memory, above what a bare ``import torch`` takes: measured in processes
of their own, on models larger than it, by any number of threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import neulig_fast as nf
from neulig_fast.checkpoints import merging, resources, workspace
from neulig_fast.checkpoints.prepared import prepare
from neulig_fast.demo import llamas
from neulig_fast.methods import BLOCK

from .test_merge_methods import normal, recipe, write

# What torch itself takes, then the most that a merge took beside it. Not getrusage's number, which
# begins at that of the process that started this one.
_MEASURED = """
import re, sys, torch
def most():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = most()
import neulig_fast as nf
nf.merge(sys.argv[1], sys.argv[2], max_ram=sys.argv[3], threads=int(sys.argv[4]))
print(most() - before)
"""
_MODELS = ("base", "m0", "m1", "m2")
_SHARED = {"weight": 0.5}


def peak(folder: Path, config: dict[str, Any], max_ram: str, threads: int, backend: str) -> float:
    """MiB that a merge takes at most."""
    (folder / "c.yml").write_text(json.dumps(config))
    files = [str(folder / "c.yml"), str(folder / "out")]
    command = [sys.executable, "-c", _MEASURED, *files, max_ram, str(threads)]
    environment = {**os.environ, "NEULIG_FAST_BACKEND": backend}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) / 1024


def large(folder: Path) -> None:
    """Models of 96 MiB: a tensor of 40 MiB, and seven as large as a thread of eight can hold."""
    for k, name in enumerate(_MODELS):
        g = torch.Generator().manual_seed(k)
        part = torch.randn(1 << 20, generator=g).to(torch.bfloat16)
        tensors = {"embed": part.repeat(20).view(-1, 2048)}
        tensors |= {f"layers.{i}.w": part.repeat(4).view(-1, 1024) for i in range(7)}
        llamas.write(folder / name, tensors, shards=1)


_METHODS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "linear": (3, _SHARED, {}),
    "ties": (3, {**_SHARED, "density": 0.5}, {}),
    "dare_ties": (3, {**_SHARED, "density": 0.5}, {}),
    "slerp": (1, {}, {"t": 0.4}),
    "model_stock": (3, {}, {"filter_wise": True}),
    "sce": (3, {}, {"select_topk": 0.5}),
    "arcee_fusion": (1, {}, {}),
    "pcb": (3, {}, {}),
}


@pytest.mark.parametrize(
    ("method", "threads"),
    [
        *((method, threads) for method in ("linear", "ties", "dare_ties") for threads in (1, 2, 8)),
        *((method, 8) for method in ("slerp", "model_stock", "sce", "arcee_fusion", "pcb")),
    ],
)
def test_memory_stays_below_its_ceiling(
    tmp_path: Path, once: Callable[..., Path], method: str, threads: int
) -> None:
    models = once("large-models", large)
    count, each, parameters = _METHODS[method]
    listed = [{"model": str(models / f"m{i}"), "parameters": each} for i in range(count)]
    config = {"merge_method": method, "models": listed, "parameters": parameters}
    config["base_model"] = str(models / "base")
    max_ram = 256 if threads == 8 else 192
    assert peak(tmp_path, config, f"{max_ram}M", threads, "") <= max_ram


@pytest.mark.parametrize("threads", [1, 4])
def test_and_without_the_extension(tmp_path: Path, once: Callable[..., Path], threads: int) -> None:
    """Sorting and counting in PyTorch take a multiple of what they are given: a block at a time."""
    models = once("large-models", large)
    listed = [
        {"model": str(models / f"m{i}"), "parameters": {"weight": 1, "density": 0.5}}
        for i in range(2)
    ]
    config = {"merge_method": "ties", "models": listed, "base_model": str(models / "base")}
    assert peak(tmp_path, config, "192M", threads, "torch") <= 192


@pytest.mark.parametrize(
    ("method", "shape", "grain"),
    [
        ("task_arithmetic", (700, 300), BLOCK),
        ("nearswap", (700, 300), BLOCK),
        ("della", (700, 300), 300 * (BLOCK // 300)),
        ("della", (2, 3 * BLOCK), 3 * BLOCK),
        ("della", (4 * BLOCK,), 4 * BLOCK),
    ],
)
def test_tiles_do_not_cut_what_a_method_computes(
    tmp_path: Path, method: str, shape: tuple[int, ...], grain: int
) -> None:
    """Rows that are cut would be kept beside the buffers."""
    write(tmp_path, {"x": normal(*shape)}, {"x": normal(*shape, seed=1)})
    each = {"weight": 1.0, "density": 0.5} if method == "della" else {"weight": 1.0}
    each, t = ({}, {"t": 0.1}) if method == "nearswap" else (each, {})
    plan = prepare(recipe(tmp_path, method, [each], **t))[0].plan
    (planned,) = plan.tensors
    least = workspace.least_bytes(planned)
    elements = planned.output.elements
    assert workspace.tile_elements(planned, least) == min(grain, elements)
    assert workspace.tile_elements(planned, 2 * least) == min(2 * grain, elements)
    with pytest.raises(ValueError, match="needs"):
        workspace.tile_elements(planned, least - 1)
    own = 0 if method == "task_arithmetic" else 20 * 2 * 4 * min(grain, elements)
    assert workspace.beside_bytes(planned, False) == own
    assert workspace.beside_bytes(planned, True) == max(own, 20 * 2 * 4 * BLOCK)


def test_threads_are_as_many_as_memory_is_for(tmp_path: Path) -> None:
    """Where they are not asked for."""
    write(tmp_path, *({"x": normal(2 * BLOCK, seed=i)} for i in range(3)))
    config = recipe(tmp_path, "sce", [{}] * 2, select_topk=0.5)
    tensors = prepare(config)[0].plan.tensors
    of_thread = resources.THREAD + workspace.beside_bytes(tensors[0], False)
    least = of_thread + workspace.least_bytes(tensors[0])
    given = resources.Resources(64, 5 * least + 1)
    assert resources.for_tensors(tensors, given, fewer=True).threads == 5
    asked = resources.for_tensors(tensors, given, fewer=False)
    assert (asked.threads, asked.beside, asked.share) == (64, of_thread, 0)
    with pytest.raises(ValueError, match="threads must be at most 5, or max_ram at least"):
        resources.check_memory(tensors, asked)
    with pytest.raises(ValueError, match="threads must be at most"):
        nf.merge(config, tmp_path / "out", max_ram="128M", threads=64)
    assert not (tmp_path / "out").exists()
    merging.foresee(config, tmp_path / "out", max_ram="128M")


def test_the_plan_of_many_tensors_counts(tmp_path: Path) -> None:
    write(tmp_path, *({"x": normal(50, seed=i)} for i in range(3)))
    config = recipe(tmp_path, "linear", [{"weight": 1}] * 3, base=False)
    write(tmp_path / "more", {"x": normal(50)}, {"x": normal(50)})
    config["models"][2]["model"] = str(tmp_path / "more/base")
    (one,) = prepare(config)[0].plan.tensors
    given = resources.Resources(1, 64 << 20)
    free = resources.for_tensors([one] * 5000, given, fewer=False)
    assert free.plan == 0 and free.share == (64 << 20) - free.beside
    many = resources.for_tensors([one] * 20_000, given, fewer=False)
    assert many.plan == (60_000 - (1 << 14)) * 1536
    assert many.share == 0
    with pytest.raises(ValueError, match=r"max_ram leaves 0 bytes to each of 1: max_ram at l") as e:
        resources.check_memory([one] * 20_000, many)
    least = int(str(e.value).split("at least ")[1][:-1]) << 20
    enough = resources.Resources(1, least - resources.OVERHEAD)
    tensors = [one] * 20_000
    resources.check_memory(tensors, resources.for_tensors(tensors, enough, fewer=False))
