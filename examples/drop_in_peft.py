"""TIES of three LoRA adapters with peft alone, and under nf.patch."""

import time

import torch

import neulig_fast as nf

nf.patch("peft").undo()  # where it is missing this says how to install it

import peft  # noqa: E402

names, weights = ["a0", "a1", "a2"], [0.5, 0.3, 0.2]
config = peft.LoraConfig(r=16, target_modules=["0", "1"], init_lora_weights=False)
layers = torch.nn.Sequential(torch.nn.Linear(1024, 2048), torch.nn.Linear(2048, 1024))
model = peft.get_peft_model(layers, config, adapter_name=names[0])
for name in names[1:]:
    model.add_adapter(name, config)


def seconds(merged):
    begin = time.perf_counter()
    model.add_weighted_adapter(names, weights, merged, combination_type="ties", density=0.5)
    return time.perf_counter() - begin


print(f"peft: {1e3 * seconds('plain'):.1f} ms")
with nf.patch("peft"):
    print(f"under nf.patch: {1e3 * seconds('fused'):.1f} ms")
