"""peft's adapters and merges, kept in data/peft (tools/peft_golden.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import neulig_fast as nf
from neulig_fast.demo import llamas

DATA = Path(__file__).parent / "data/peft"
ADAPTERS = sorted(path.parent.name for path in DATA.glob("*/adapter_config.json"))
MERGES: dict[str, dict[str, Any]] = yaml.safe_load((DATA / "merges.yml").read_text())
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = (0.5, -0.3, 1.2)

in_both = pytest.mark.parametrize("dtype", DTYPES)


def unit(dtype: str) -> float:
    """The largest relative error of one rounding."""
    return torch.finfo(DTYPES[dtype]).eps / 2


# -- adapters -------------------------------------------------------------------------------------


@in_both
@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_is_merged_as_peft_merges_it(tmp_path: Path, case: str, dtype: str) -> None:
    """To the rounding of the product and of the sum, in the model's type: two in peft, one here."""
    base, wanted = (
        DATA / f"base-{dtype}.safetensors",
        load_file(DATA / case / f"merged-{dtype}.safetensors"),
    )
    models = [{"model": f"{base}+{DATA / case}"}]
    nf.merge({"merge_method": "passthrough", "models": models}, tmp_path / "out")
    got, own = llamas.load(tmp_path / "out"), load_file(base)
    assert got.keys() == wanted.keys()
    changed = [name for name in wanted if not torch.equal(own[name], wanted[name])]
    assert changed, "the adapter must do something"
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype == own[name].dtype
        if name not in changed:
            assert torch.equal(got[name], value), name
            continue
        size = own[name].double().abs() + (value.double() - own[name].double()).abs()
        # Products of fp32 numbers are sums of four terms at most, of any order.
        bound = (2 * unit(dtype) + 16 * unit("float32")) * 4 * size + 1e-6
        assert ((got[name].double() - value.double()).abs() <= bound).all(), name


# -- merges of task vectors -----------------------------------------------------------------------


def oracle(case: str, d: Tensor, drawn: Tensor | None) -> Tensor:
    """peft's definitions in fp64, with what it means to drop: d (N, ...) of a tensor, and which of
    its elements were drawn."""
    how = MERGES[case]["peft"]
    density, flat = how.get("density", 1), d.double().flatten(1)
    kept = torch.ones_like(flat, dtype=torch.bool)
    if drawn is not None:
        kept = drawn.flatten(1)
    elif density < 1:
        last = flat.abs().argsort(dim=1, descending=True)[:, int(density * flat.shape[1]) :]
        kept.scatter_(1, last, False)
    v = torch.where(kept, flat, 0)
    if drawn is not None and density > 0:
        v = v / density
    weighted = torch.tensor(WEIGHTS, dtype=torch.float64)[:, None] * v
    if "ties" not in how["function"]:
        return weighted.sum(0).view_as(d[0])
    votes = v.sign() if how.get("majority_sign_method") == "frequency" else v
    agree = v.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    merged = torch.where(agree, weighted, 0).sum(0) / agree.sum(0).clamp(min=1)
    return merged.view_as(d[0])


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(DATA / "merges.safetensors")


def vectors(golden: dict[str, Tensor], case: str, tensor: str) -> tuple[Tensor, Tensor | None]:
    d = torch.stack([golden[f"{tensor}/{i}"] for i in range(3)])
    if "dare" not in MERGES[case]["peft"]["function"]:
        return d, None
    return d, torch.stack([golden[f"{case}/{tensor}/{i}/drawn"] for i in range(3)])


def merged(root: Path, golden: dict[str, Tensor], case: str, dtype: str) -> dict[str, Tensor]:
    """What a recipe makes of task vectors on a base of zeros."""
    tensors = sorted({name.split("/")[0] for name in golden if name.endswith("/0")})
    models = []
    for i, weight in enumerate(WEIGHTS):
        state = {name: golden[f"{name}/{i}"].to(DTYPES[dtype]) for name in tensors}
        save_file(state, root / f"m{i}.safetensors")
        models.append({"model": str(root / f"m{i}.safetensors"), "parameters": {"weight": weight}})
    save_file({n: torch.zeros_like(t) for n, t in state.items()}, root / "base.safetensors")
    config = {**MERGES[case]["recipe"], "models": models}
    nf.merge(config | {"base_model": str(root / "base.safetensors")}, root / "out")
    return llamas.load(root / "out")


def within(a: Tensor, b: Tensor, bound: Tensor) -> Tensor:
    return (a == b) | ((a.double() - b.double()).abs() <= bound)


@in_both
@pytest.mark.parametrize("case", MERGES)
def test_task_vectors_are_merged_as_peft_merges_them(
    tmp_path: Path, golden: dict[str, Tensor], case: str, dtype: str
) -> None:
    """Sums are formed in fp32 and rounded once. peft rounds what is pruned and divided, too.

    peft drops elements by multiplying with 0, and divides by a density of 0: infinities that are
    dropped, or do not agree, and everything of density 0 become NaN there. What is dropped is no
    part of a sum, whatever it was, so that here the result is that of the others.
    """
    for tensor, got in merged(tmp_path, golden, case, dtype).items():
        d, drawn = vectors(golden, case, tensor)
        exact, theirs = oracle(case, d, drawn), golden[f"{case}/{tensor}/{dtype}"]
        density = MERGES[case]["peft"].get("density", 1) or 1
        size = torch.einsum("n,n...->...", torch.tensor(WEIGHTS).abs(), d.abs()).double() / density
        fp32 = 8 * unit("float32") * size
        assert not exact.isnan().any()
        assert within(got, exact, unit(dtype) * exact.abs() + fp32).all(), tensor
        lost = theirs.isnan()
        assert within(got, theirs, 3 * unit(dtype) * size + fp32)[~lost].all(), tensor
        nothing = drawn is not None and MERGES[case]["peft"]["density"] == 0
        assert torch.equal(lost, torch.ones_like(lost) if nothing else d.isinf().any(0) & lost)
        assert nothing or tensor == "c.bias" or not lost.any()


def test_where_peft_gives_nan(golden: dict[str, Tensor]) -> None:
    """The cases above have what they are there for."""
    lost = {name for name, t in golden.items() if t.is_floating_point() and t.isnan().any()}
    for case in ("dare_linear_nothing_left", "dare_ties_nothing_left"):
        assert f"{case}/b.bias/float32" in lost
    assert "ties_frequency/c.bias/float32" in lost


def test_elections_differ(golden: dict[str, Tensor]) -> None:
    """By sums, by counts and, as mergekit elects, by weighted sums."""
    d, _ = vectors(golden, "ties_whole", "a.weight")
    w = torch.tensor(WEIGHTS)[:, None, None]
    signs = [x.sum(0) >= 0 for x in (d, d.sign(), w * d)]
    assert (signs[0] != signs[1]).any() and (signs[0] != signs[2]).any()


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
@pytest.mark.parametrize("parity", ["mergekit", "paper"])
def test_majorities_are_of_peft_alone(
    tmp_path: Path, golden: dict[str, Tensor], method: str, parity: str
) -> None:
    merged(tmp_path, golden, "ties", "float32")
    config = {"merge_method": method, "base_model": str(tmp_path / "base.safetensors")}
    config |= {"models": [{"model": str(tmp_path / "m0.safetensors"), "parameters": {"weight": 1}}]}
    config |= {"parameters": {"majority_sign_method": "frequency"}}
    with pytest.raises(
        ValueError, match="majority_sign_method: frequency is peft's: .*got " + parity
    ):
        nf.merge(config | {"neulig_fast": {"parity": parity}}, tmp_path / "no")
    config["parameters"] = {"majority_sign_method": "frequencies"}
    with pytest.raises(ValueError, match=r"must be one of total, frequency.*did you mean"):
        nf.merge(config | {"neulig_fast": {"parity": "peft"}}, tmp_path / "no")
