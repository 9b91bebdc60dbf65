"""TIES of three deltas in an sd-mecha recipe as it is, and under nf.patch."""

import time

import torch

import neulig_fast as nf

nf.patch("sd_mecha").undo()  # where it is missing this says how to install it

import sd_mecha  # noqa: E402

base = {f"layer.{i}": torch.randn(512, 1024) for i in range(2)}
models = [
    {key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in base.items()} for _ in range(3)
]
deltas = [sd_mecha.subtract(model, base) for model in models]
recipe = sd_mecha.add_difference(base, sd_mecha.ties_sum(*deltas, k=0.2))


def seconds():
    begin = time.perf_counter()
    sd_mecha.merge(recipe, threads=0)
    return time.perf_counter() - begin


print(f"sd-mecha: {1e3 * seconds():.1f} ms")
with nf.patch("sd_mecha"):
    print(f"under nf.patch: {1e3 * seconds():.1f} ms")
