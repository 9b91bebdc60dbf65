"""An exponential average of a model in training, with torch's function and under nf.patch."""

import time

import torch
from torch.optim import swa_utils

import neulig_fast as nf

model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(50)))


def seconds(steps=20):
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.999))
    average.update_parameters(model)  # the first one is a copy
    begin = time.perf_counter()
    for _ in range(steps):
        average.update_parameters(model)
    return (time.perf_counter() - begin) / steps


print(f"torch: {1e3 * seconds():.2f} ms a step")
with nf.patch("torch_swa"):
    print(f"under nf.patch: {1e3 * seconds():.2f} ms a step")
