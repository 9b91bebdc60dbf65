"""TIES of three models with mergekit alone, and under nf.patch."""

import time

import torch

import neulig_fast as nf

nf.patch("mergekit").undo()  # where it is missing this says how to install it

from mergekit.merge_methods import merge_state_dicts  # noqa: E402

base = {f"layer.{i}": torch.randn(512, 1024) for i in range(2)}
models = {
    name: {key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in base.items()}
    for name in "abc"
}
parameters = {"weight": [0.5, 0.3, 0.2], "density": 0.2}


def seconds():
    begin = time.perf_counter()
    merge_state_dicts({"base": base, **models}, "ties", parameters=parameters, base="base")
    return time.perf_counter() - begin


print(f"mergekit: {1e3 * seconds():.1f} ms")
with nf.patch("mergekit"):
    print(f"under nf.patch: {1e3 * seconds():.1f} ms")
