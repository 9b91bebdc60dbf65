"""The examples run, at a size of seconds."""

import dataclasses
import importlib.util
import io
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from rich.console import Console

import neulig_fast as nf
from neulig_fast.compat import _patch
from neulig_fast.demo import tasks
from neulig_fast.demo.settings import DemoSettings

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def adamerging():
    return load("adamerging")


def test_adamerging_compares_merges_on_every_task(adamerging):
    small = dataclasses.replace(DemoSettings.toy(), pretrain_steps=3, test_size=40)
    console = Console(file=io.StringIO(), width=120)
    results = adamerging.run(small, 3, console)
    learned = [f"AdaMerging per {by}" for by in ("layer", "tensor")]
    given = ["pre-trained", "uniform average", "task arithmetic, 0.3"]
    assert list(results) == [*given, *learned]
    for accuracy in results.values():
        assert list(accuracy) == [*tasks.TASK_NAMES, "mean"]
        assert all(0 <= percent <= 100 for percent in accuracy.values())
    printed = console.file.getvalue()
    assert "transformer.resblocks.1" in printed and "task arithmetic, 0.3" in printed


def test_adaptation_lowers_the_entropy_and_moves_coefficients_alone(adamerging):
    towers = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8)) for _ in range(3)]
    pool = nf.ExpertPool(towers)
    before = pool.params.clone()
    module = nf.CoefficientModule(pool, "layer", init=0.3, constraint="clamp", base=0)
    heads = {name: nf.Head(torch.randn(5, 8)) for name in ("one", "two")}
    images = {name: torch.randn(50, 3, 2, 2) for name in heads}
    losses = list(adamerging.adapt(module, heads, images, steps=60, seed=0))
    assert sum(losses[-10:]) < sum(losses[:10])
    assert torch.equal(pool.params, before)
    again = nf.CoefficientModule(pool, "layer", init=0.3, constraint="clamp", base=0)
    assert list(adamerging.adapt(again, heads, images, steps=5, seed=0)) == losses[:5]


HOSTS = [p.stem[8:] for p in sorted(EXAMPLES.glob("drop_in_*.py"))]


@pytest.mark.parametrize("host", [host for host in HOSTS if host != "torch_swa"])
def test_an_example_without_its_host_says_how_to_install_it(host, monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(_patch, "version", missing)
    for name in [host, *(n for n in sys.modules if n.startswith(f"{host}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"patch: {host} is not installed: pip install"):
        load(f"drop_in_{host}")


@pytest.mark.parametrize("host", HOSTS)
def test_drop_ins_print_both_times(host, capsys, monkeypatch):
    # transformers would take kernels/, in our source tree, for a project of that name.
    installed = [path for path in sys.path if not Path(path, "kernels", "_launch.py").exists()]
    monkeypatch.setattr(sys, "path", installed)
    module = {"torch_swa": "torch"}.get(host, host)
    pytest.importorskip(module, reason=f"{module} is not installed")
    load(f"drop_in_{host}")
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("under nf.patch: ") and len(printed) >= 2
    assert nf.patch.status() == ()
