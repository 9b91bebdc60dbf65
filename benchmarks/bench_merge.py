"""Whole checkpoints: ``nf.merge`` against mergekit and against reading and writing alone.

A base and three models of Llama's shape in bf16, generated; in process, after imports, from files
in the system's cache to files that have reached the disk, with checksums (mergekit and the floor do
neither). mergekit runs in a process of its own where ``NEULIG_FAST_MERGEKIT`` names a Python that
has it, and is asked to merge through a pipe; its random masks are others, so that DARE is checked
by nothing but the share of elements that differ from the base.

``--models 4G`` (or ``NEULIG_FAST_MERGE_MODELS``) makes each model of about so many bytes instead;
all processors take part then, and where there is a GPU merging on it is one more row of the case.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import neulig_fast as nf
from neulig_fast.checkpoints import sizes
from neulig_fast.demo import llamas

from . import harness, machine
from .harness import Case, Provider
from .mergekit import Mergekit

_SIZES = {"width": 1024, "layers": 8, "words": 32_000}  # 170 M parameters
_TOY = {"width": 32, "layers": 2, "words": 64}
_MODELS = ("m0", "m1", "m2")
_METHODS: dict[str, dict[str, Any]] = {
    "linear": {"each": {"weight": 0.3}},
    "task_arithmetic": {"each": {"weight": 0.3}, "base": True},
    "ties": {"each": {"weight": 0.3, "density": 0.5}, "base": True},
    "dare_ties": {"each": {"weight": 0.3, "density": 0.5}, "base": True},
    "slerp": {"parameters": {"t": 0.4}, "base": True, "models": ("m0",)},
}


def shaped(size: int) -> dict[str, int]:
    """Llama's numbers, of a model of about ``size`` bytes in bf16: wider where it is larger."""
    width = 1024 if size < 2 << 30 else 2048 if size < 8 << 30 else 4096
    words = _SIZES["words"] if size > 1 << 28 else _TOY["words"]
    layers = round((size / 2 - 2 * words * width) / (13 * width**2))
    return {"width": width, "layers": max(layers, 1), "words": words}


@functools.cache
def models(**numbers: int) -> Path:
    """A folder with the generated models, for as long as the process lives."""
    folder = tempfile.TemporaryDirectory(prefix="merge-")
    for _ in llamas.written(Path(folder.name), len(_MODELS), **numbers):
        pass
    _FOLDERS.append(folder)
    return Path(folder.name)


_FOLDERS: list[tempfile.TemporaryDirectory[str]] = []


def recipe(folder: Path, method: str) -> Path:
    """The file of a merge."""
    given = _METHODS[method]
    content: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {"model": str(folder / name), "parameters": given.get("each", {})}
            for name in given.get("models", _MODELS)
        ],
        "parameters": given.get("parameters", {}),
        "dtype": "bfloat16",
    }
    if given.get("base"):
        content["base_model"] = str(folder / "base")
        if method == "slerp":
            content["models"].insert(0, {"model": str(folder / "base")})
    path = folder / f"{method}.yml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return path


def floor(folder: Path, inputs: list[str], out: Path) -> None:
    """Read all and write one, with safetensors alone."""
    states = [load_file(file) for name in inputs for file in (folder / name).glob("*.safetensors")]
    out.mkdir(exist_ok=True)
    merged: dict[str, Tensor] = {}
    for file, state in enumerate(states):
        for tensor in state.values():
            tensor.sum()  # every byte is read
        if file < 1 + len(states) // len(inputs):
            merged |= state
    save_file(merged, out / "model.safetensors")


def eager(folder: Path, method: str, out: Path) -> Path:
    """The same in plain PyTorch, all models in memory: in fp32, tensor by tensor."""
    given = _METHODS[method]
    states = [llamas.load(folder / name) for name in given.get("models", _MODELS)]
    base = llamas.load(folder / "base")
    merged = {}
    for name, start in base.items():
        rows = torch.stack([state[name].float() for state in states])
        merged[name] = _EAGER[method](rows, start.float()).bfloat16()
    out.mkdir(exist_ok=True)
    save_file(merged, out / "model.safetensors")
    return out


def _ties(rows: Tensor, base: Tensor) -> Tensor:
    d = (rows - base).flatten(1)
    order = d.abs().argsort(1)
    d.scatter_(1, order[:, : d.shape[1] - int(0.5 * d.shape[1])], 0)
    sign = torch.where(d.sum(0) >= 0, 1.0, -1.0)
    agree = d.sign() == sign
    count = agree.sum(0).clamp(min=1)
    return base + ((d * agree).sum(0) / count).view(base.shape)


def _dare_ties(rows: Tensor, base: Tensor) -> Tensor:
    d = rows - base
    kept = d * torch.bernoulli(torch.full_like(d, 0.5))
    before, after = (x.flatten(1).abs().sum(1) for x in (d, kept))
    t = 0.3 * kept * (before / after.clamp(min=1e-12)).view(-1, *[1] * base.ndim)
    sign = torch.where(t.sum(0) >= 0, 1.0, -1.0)
    return base + (t * (t.sign() == sign)).sum(0)


def _slerp(rows: Tensor, base: Tensor) -> Tensor:
    x, y = base.flatten(), rows[0].flatten()
    angle = torch.arccos(torch.dot(x, y) / (x.norm() * y.norm()))
    merged = (torch.sin(0.6 * angle) * x + torch.sin(0.4 * angle) * y) / torch.sin(angle)
    return merged.view(base.shape)


_EAGER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda rows, base: rows.mean(0),
    "task_arithmetic": lambda rows, base: base + 0.3 * (rows - base).sum(0),
    "ties": _ties,
    "dare_ties": _dare_ties,
    "slerp": _slerp,
}


def make_case(method: str, numbers: dict[str, int], threads: int, gpu: bool = False) -> Case:
    folder = models(**numbers)
    config = recipe(folder, method)
    given = _METHODS[method]
    inputs = [*given.get("models", _MODELS), *(["base"] if given.get("base") else [])]
    size = sum(f.stat().st_size for name in inputs for f in (folder / name).glob("*.safetensors"))
    ours, theirs, plain = (folder / f"{method}-{name}" for name in ("ours", "theirs", "floor"))

    def merge(device: str) -> Path:
        nf.merge(config, ours, threads=threads, resume=False, device=device)
        return ours

    found = [
        Provider("neulig_fast", lambda: merge("cpu"), "ours", traffic=size),
        *_on_gpu(lambda: merge("cuda:0"), size, gpu),
        Provider(
            "PyTorch, all in memory",
            lambda: eager(folder, method, folder / f"{method}-eager"),
            needs=2 * size,
            traffic=size,
        ),
    ]
    python = os.environ.get("NEULIG_FAST_MERGEKIT")
    if python:
        mergekit = Mergekit(python, threads)

        def with_mergekit() -> Path:
            mergekit(config, theirs)
            return theirs

        found.append(Provider("mergekit", with_mergekit, traffic=size))
    found.append(
        Provider(
            "ceiling/safetensors alone",
            lambda: floor(folder, inputs, plain),
            "ceiling",
            traffic=size,
        )
    )
    return Case(
        op="merge",
        mode=method,
        shape=_shape(numbers, size // len(inputs)),
        dtype=torch.bfloat16,
        device="cpu",
        threads=threads,
        providers=[dataclasses.replace(one, within=_synced) for one in found],
        check=_check(folder, method),
        traffic=size,
        numbers={"N": len(given.get("models", _MODELS))},
    )


@contextlib.contextmanager
def _synced() -> Iterator[None]:
    """What others have written and left to the system is on the disk before anyone is timed: who
    syncs their files would wait for those too."""
    os.sync()
    yield


def command_case(method: str, numbers: dict[str, int], threads: int, python: str) -> Case:
    """The same by the command line, as mergekit's: start-up, imports and planning included."""
    case = make_case(method, numbers, threads)
    folder = models(**numbers)
    config = str(folder / f"{method}.yml")
    ours, theirs = (folder / f"{method}-{name}-command" for name in ("ours", "theirs"))
    number = str(threads)

    def run(*command: str, out: Path) -> Path:
        environment = {**os.environ, "OMP_NUM_THREADS": number}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, cwd=tempfile.gettempdir()
        )
        if done.returncode:
            raise RuntimeError(done.stderr[-1000:])
        return out

    merge = (sys.executable, "-m", "neulig_fast", "merge", config, str(ours), "--no-resume")
    mergekit = (str(Path(python).with_name("mergekit-yaml")), config, str(theirs))
    more = ("--no-copy-tokenizer", "--lazy-unpickle", "--quiet")
    found = [
        Provider("neulig_fast", lambda: run(*merge, "--threads", number, out=ours), "ours"),
        Provider("mergekit", lambda: run(*mergekit, *more, out=theirs)),
    ]
    providers = [dataclasses.replace(p, within=_synced, traffic=case.traffic) for p in found]
    return dataclasses.replace(case, mode=f"{method}; whole command", providers=providers)


def _on_gpu(merge: Callable[[], Path], size: int, wanted: bool) -> list[Provider]:
    """Timed by the clock, as what it stands beside: most of it is reading and writing."""
    if not wanted or not torch.cuda.is_available():
        return []
    return [Provider(f"neulig_fast on {torch.cuda.get_device_name()}", merge, "ours", traffic=size)]


def _shape(numbers: dict[str, int], size: int) -> str:
    if numbers == _TOY:
        return "toy Llama"
    return f"Llama, {size / 1e9:.1f} GB" if size >= 1e9 else f"Llama, {size / 1e6:.0f} MB"


def _check(folder: Path, method: str) -> Callable[[Path], None]:
    def check(out: Path) -> None:
        got, base = llamas.load(out), llamas.load(folder / "base")
        name = "model.layers.0.mlp.up_proj.weight"
        if got.keys() != base.keys():
            raise AssertionError("tensors are missing")
        x, b = got[name].double(), base[name].double()
        rows = torch.stack([llamas.load(folder / m)[name].double() for m in _MODELS])
        if method == "linear":
            wanted = rows.mean(0)
        elif method == "task_arithmetic":
            wanted = b + 0.3 * (rows - b).sum(0)
        else:  # tests compare the rest with mergekit, element by element
            changed = float((x != b).double().mean())
            if not 0.3 < changed <= 1:
                raise AssertionError(f"{changed} of the elements are not the base's")
            return
        # mergekit rounds after every step: some last places of bf16
        if float((x - wanted).abs().max()) > 4 * 2.0**-8 * float(wanted.abs().max()):
            raise AssertionError("not the merge of the models")

    return check


def cases(
    device: str, quick: bool, models: str | None = None, methods: list[str] | None = None
) -> Iterator[Case]:
    if device != "cpu":
        return
    size = models or os.environ.get("NEULIG_FAST_MERGE_MODELS")
    if size and not quick:
        for method in methods or _METHODS:
            numbers = shaped(sizes.parse("models", size))
            yield make_case(method, numbers, machine.cores(), gpu=True)
        return
    numbers = _TOY if quick else _SIZES
    for method in methods or _METHODS:
        yield make_case(method, numbers, 1)
        if python := os.environ.get("NEULIG_FAST_MERGEKIT"):
            yield command_case(method, numbers, 1, python)
    if not quick and machine.cores() > 1:
        yield make_case("linear", numbers, machine.cores())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Benchmark merge.")
    parser.add_argument("--models", help="bytes of each model, such as 1G (default: 340 MB)")
    parser.add_argument("--methods", nargs="+", choices=list(_METHODS), help="default: all")
    harness.main("merge", cases, parser)
