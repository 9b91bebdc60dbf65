"""A step of AdaMerging's coefficients, by FusionBench and under nf.patch."""

import time

import torch

import neulig_fast as nf

nf.patch("fusion_bench").undo()  # where it is missing this says how to install it

from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel  # noqa: E402

models = [torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(50))) for _ in range(6)]
weights = torch.full((5, 100), 0.3)  # of five task vectors and a hundred tensors
merged = LayerWiseMergedModel(weights, models[0], models[1:])
batch = torch.randn(8, 256)


def seconds(steps=5):
    begin = time.perf_counter()
    for _ in range(steps):
        merged.merge_weights()
        merged(batch).square().mean().backward()
    return (time.perf_counter() - begin) / steps


print(f"FusionBench: {1e3 * seconds():.1f} ms a step")
with nf.patch("fusion_bench"):
    print(f"under nf.patch: {1e3 * seconds():.1f} ms a step")
