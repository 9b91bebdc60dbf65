"""Merge methods one by one: DELLA, RAM, consensus, EMR, Arcee Fusion, means over a run, Fisher.

Against formulas in fp64 that share no code with the methods, closed forms, and hostile tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

import neulig_fast as nf
from neulig_fast.checkpoints import tiles
from neulig_fast.demo import llamas as samples
from neulig_fast.methods import BLOCK, Task, Tile, fusion
from neulig_fast.methods._bands import Band
from neulig_fast.methods.trajectory import ema_weights, wsm_weights

State = Mapping[str, Tensor]
NAN, INF = float("nan"), float("inf")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def coarse(*shape: int, seed: int = 0) -> Tensor:
    """Multiples of 1/4: many are equal, and their differences exact."""
    return (normal(*shape, seed=seed) * 4).round() / 4


SHAPES = {"a": (6, 9), "v": (13,), "column": (5, 1), "cube": (2, 3, 4)}


def small_states(count: int) -> list[dict[str, Tensor]]:
    return [{n: coarse(*s, seed=10 * i + len(s)) for n, s in SHAPES.items()} for i in range(count)]


def write(folder: Path, *states: State, dtype: torch.dtype = torch.float32) -> None:
    """``m0`` ..., and the last one as ``base``."""
    for i, state in enumerate(states):
        name = "base" if i == len(states) - 1 else f"m{i}"
        samples.write(folder / name, state, dtype, shards=1)


def recipe(
    folder: Path, method: str, each: list[dict[str, Any]], base: bool = True, **more: Any
) -> dict[str, Any]:
    """Of m0, m1, ..., as many as there are parameters of."""
    models = [{"model": str(folder / f"m{i}"), "parameters": own} for i, own in enumerate(each)]
    config = {"merge_method": method, "models": models, "dtype": "float32"}
    if base:
        config["base_model"] = str(folder / "base")
    if "parity" in more:
        config["neulig_fast"] = {"parity": more.pop("parity")}
    return config | ({"parameters": more} if more else {})


def merged(folder: Path, config: Mapping[str, Any], **options: Any) -> dict[str, Tensor]:
    nf.merge(config, folder / "out", **options)
    return samples.load(folder / "out")


def of_one(folder: Path, method: str, rows: Tensor, each: Any = None, **more: Any) -> Tensor:
    """The merge of a tensor: experts' (N, ...) task vectors on a base of zeros."""
    write(folder, *({"x": row} for row in rows), {"x": torch.zeros_like(rows[0])})
    return merged(folder, recipe(folder, method, each or [{}] * len(rows), **more))["x"]


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        act()
    return str(caught.value)


def close(got: Tensor, wanted: Any, slack: float = 4e-7) -> None:
    expected = torch.as_tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(got.double(), expected, rtol=slack, atol=slack)


# -- tiles ----------------------------------------------------------------------------------------

_WEIGHTED = {"weight": 0.7}
EVERY: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "della": ([{**_WEIGHTED, "density": 0.6, "epsilon": 0.3}] * 2, {}),
    "della_linear": ([{**_WEIGHTED, "density": 0.4}] * 2, {"parity": "paper"}),
    "ram": ([{}] * 3, {"epsilon": 0.5}),
    "ramplus_tl": ([{}] * 3, {"epsilon": 1.0, "r": 0.7, "alpha": 3.0}),
    "consensus": ([_WEIGHTED] * 3, {}),
    "emr": ([{}] * 3, {}),
    "arcee_fusion": ([{}], {}),
    "ema": ([{}] * 3, {"decay": 0.6, "base": False}),
    "wsm": ([{}] * 3, {"schedule": "1-sqrt", "base": False}),
    "fisher": ([{"fisher": "m2"}, {"fisher": "base"}], {"base": False}),
}


@pytest.mark.parametrize("method", EVERY)
def test_bits_depend_on_neither_threads_nor_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Rows that end within tiles, rows longer than a tile, and one that is the whole tensor."""
    shapes = {"rows": (2100, 100), "long": (3, 70001), "flat": (3 * BLOCK + 5,), "small": (3, 4)}
    states = [{n: coarse(*s, seed=i) for n, s in shapes.items()} for i in range(4)]
    write(tmp_path, *states)
    each, more = EVERY[method]
    each = [
        own | {"fisher": str(tmp_path / own["fisher"])} if "fisher" in own else own for own in each
    ]
    config = recipe(tmp_path, method, each, **more)
    wanted = merged(tmp_path, config, threads=1)
    monkeypatch.setattr(tiles, "_STREAMED", BLOCK)
    monkeypatch.setattr(tiles, "_KEPT", 0)  # what is looked at is read again
    again = merged(tmp_path, config, threads=2, resume=False)
    monkeypatch.setattr(
        tiles, "tile_elements", lambda planned, memory: min(BLOCK, planned.output.elements)
    )
    beyond = merged(tmp_path, config, threads=3, resume=False)
    for name, tensor in wanted.items():
        assert torch.equal(tensor, again[name]), name
        assert torch.equal(tensor, beyond[name]), name


@pytest.mark.parametrize("method", EVERY)
def test_a_dry_run_looks_at_a_part_of_a_tensor(tmp_path: Path, method: str) -> None:
    from neulig_fast.checkpoints.pipeline import merged_alone
    from neulig_fast.checkpoints.plan import Planned
    from neulig_fast.methods import METHODS, Task

    each, more = EVERY[method]
    found = METHODS[method]
    settings = {
        key: [own.get(key, p.default) for own in each] if p.each else more.get(key, p.default)
        for key, p in found.parameters.items()
    }
    task = Task("x", (40, 9000), len(each), found.base == "needed", settings)
    rows = normal(len(each) * (2 if found.beside else 1) + task.base, 2 * BLOCK).abs()
    out = torch.full((2 * BLOCK,), NAN)
    merged_alone(found, (Planned(task, (), "F32", None),), rows, out)  # type: ignore[arg-type]
    assert out.isfinite().all()


def test_thresholds_of_fp64_are_not_rounded() -> None:
    from neulig_fast.checkpoints.pipeline import merged_alone
    from neulig_fast.checkpoints.plan import Planned
    from neulig_fast.methods import METHODS, Task

    settings = {"weight": [1.0], "density": [0.5], "lambda": 1.0}
    task = Task("x", (100,), 1, True, {**settings, "normalize": False, "rescale": False})
    d = 1 + torch.arange(100, dtype=torch.float64) * 2.0**-30  # all of them 1 in fp32
    rows, out = torch.stack([d, torch.zeros_like(d)]), torch.empty_like(d)
    merged_alone(METHODS["ties"], (Planned(task, (), "F64", None),), rows, out)  # type: ignore[arg-type]
    assert torch.equal(out, d.where(torch.arange(100) >= 50, 0))


# -- DELLA ----------------------------------------------------------------------------------------


def philox(key: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-7 of whole numbers, after Salmon, Moraes, Dror, Shaw, SC 2011."""
    mask, (a, b, c, d) = 2**32 - 1, counter
    low, high = key & mask, key >> 32 & mask
    for _ in range(7):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (right >> 32) ^ b ^ low, right & mask, (left >> 32) ^ d ^ high, left & mask
        low, high = (low + 0x9E3779B9) & mask, (high + 0xBB67AE85) & mask
    return a, b, c, d


def drawn(name: str, expert: int, place: int, chance: float, seed: int) -> bool:
    stream = xxh3_64_intdigest(f"{name}/{expert}".encode()) - 2**63
    mask, number, half = 2**32 - 1, place % 64 // 16, place % 2
    words = [
        philox(seed, (place // 64 * 8 + place % 16 // 2, top, stream & mask, stream >> 32 & mask))
        for top in (0, 2**31)
    ]
    upper, lower = (each[number] >> 16 * half & 0xFFFF for each in words)
    return upper << 16 | lower < round(float(np.float32(chance)) * 2**32)


def chances(row: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """By sorting with Python's own words."""
    width = len(row)
    if density in (0, 1) or width == 1:
        return np.full(width, density)
    found = np.empty(width)
    for rank, j in enumerate(sorted(range(width), key=lambda j: (-abs(row[j]), j))):
        found[j] = density + epsilon - 2 * epsilon * rank / (width - 1)
    return found


def kept(name: str, expert: int, d: np.ndarray, own: Any, scaled: str, seed: int) -> np.ndarray:
    rows = d.reshape(-1, d.shape[-1])
    p = np.stack([chances(row, own["density"], own["epsilon"]) for row in rows])
    mask = [drawn(name, expert, k, chance, seed) for k, chance in enumerate(p.flat)]
    result = np.where(np.reshape(mask, rows.shape), rows, 0)
    if scaled == "paper":
        result = result / np.where(p > 0, p, 1)
    elif scaled == "mergekit" and np.abs(result).sum():
        result = result * (np.abs(rows).sum() / np.abs(result).sum())
    return result.reshape(d.shape)


@pytest.mark.parametrize("elected", [True, False])
@pytest.mark.parametrize("scaled", ["mergekit", "paper", "no"])
def test_della_as_the_oracle_has_it(tmp_path: Path, elected: bool, scaled: str) -> None:
    states = small_states(4)
    write(tmp_path, *states)
    each = [
        {"weight": 0.5, "density": 0.5, "epsilon": 0.3},
        {"weight": 1.5, "density": 0.7, "epsilon": 0.25},
        {"weight": 1.0, "density": 1.0, "epsilon": 0.1},
    ]
    more = {"parity": scaled} if scaled != "no" else {}
    config = recipe(
        tmp_path,
        "della" if elected else "della_linear",
        each,
        **{"lambda": 0.8, "normalize": True, "rescale": scaled != "no"},
        **more,
    )
    got = merged(tmp_path, config, seed=11)
    for name, base in states[-1].items():
        d = [states[i][name].double().numpy() - base.double().numpy() for i in range(3)]
        v = np.stack([kept(name, i, d[i], each[i], scaled, 11) for i in range(3)])
        w = np.array([own["weight"] for own in each]).reshape(3, *[1] * base.ndim)
        agrees = np.ones_like(v, dtype=bool)
        if elected:
            agrees = v * np.where((w * v).sum(0) < 0, -1, 1) > 0
        total = (w * v * agrees).sum(0)
        divisor = np.where(agrees.any(0), (w * agrees).sum(0), 1) if elected else w.sum()
        close(got[name], base.double().numpy() + 0.8 * total / divisor, 2e-6)


def test_della_keeps_by_rank_and_is_right_in_the_mean(tmp_path: Path) -> None:
    d = normal(1, 400, 64)
    each = [{"weight": 1, "density": 0.6, "epsilon": 0.3}]
    got = of_one(tmp_path, "della_linear", d, each, parity="paper")
    order = d[0].abs().argsort(dim=1, descending=True)
    share = (got != 0).gather(1, order).double().mean(0)
    p = torch.linspace(0.9, 0.3, 64, dtype=torch.float64)
    assert ((share - p).abs() < 5 * (p * (1 - p) / 400).sqrt()).all()
    assert (share - 0.6).mean().abs() < 5 * (0.24 / d.numel()) ** 0.5
    spread = (d[0].double().square().gather(1, order) * (1 - p) / p).sum().sqrt()
    assert (got.double() - d[0]).sum().abs() < 5 * spread


def test_della_without_epsilon_is_dare(tmp_path: Path) -> None:
    write(tmp_path, *small_states(3))
    own = [{"weight": 0.5, "density": 0.6}, {"weight": 1.0, "density": 0.3}]
    each = [one | {"epsilon": 0} for one in own]
    for method, other in (("della", "dare_ties"), ("della_linear", "dare_linear")):
        for more in ({"parity": "paper"}, {"rescale": False}):
            options: dict[str, Any] = {"normalize": True, **more}
            got = merged(tmp_path, recipe(tmp_path, method, each, **options), seed=5)
            wanted = merged(tmp_path, recipe(tmp_path, other, own, **options), seed=5)
            assert all(torch.equal(got[name], wanted[name]) for name in SHAPES)


def test_della_that_keeps_all_or_nothing(tmp_path: Path) -> None:
    states = small_states(3)
    write(tmp_path, *states)
    every = recipe(tmp_path, "della", [{"weight": 0.5, "density": 1}] * 2)
    ties = recipe(tmp_path, "ties", [{"weight": 0.5}] * 2)
    got, wanted = merged(tmp_path, every), merged(tmp_path, ties)
    assert all(torch.equal(got[name], wanted[name]) for name in SHAPES)
    nothing = recipe(tmp_path, "della", [{"weight": 0.5, "density": 0}] * 2)
    got = merged(tmp_path, nothing)
    assert all(torch.equal(got[name], states[-1][name]) for name in SHAPES)


@pytest.mark.parametrize("size", [1e-20, 1.0])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "dare_linear", "della_linear"])
def test_sums_of_next_to_nothing_are_not_made_up_for(
    tmp_path: Path, method: str, size: float
) -> None:
    """As mergekit has it, which for magnitudes that sum to less than 1e-7 leaves what is kept."""
    d = normal(1, 4, 50) * size
    each = [{"weight": 1, "density": 0.5}]
    got = of_one(tmp_path, method, d, each, rescale=True)[None]
    scale = float(d.abs().double().sum() / d[got != 0].abs().double().sum()) if size == 1 else 1.0
    assert 0.3 < float((got != 0).double().mean()) < 0.7
    assert torch.allclose(got, torch.where(got != 0, d * scale, 0), rtol=1e-5, atol=0)


def test_della_restores_the_sum_of_magnitudes(tmp_path: Path) -> None:
    d = normal(1, 30, 40)
    got = of_one(tmp_path, "della_linear", d, [{"weight": 1, "density": 0.3}])
    assert 0.2 < (got != 0).double().mean() < 0.4
    assert float(got.abs().sum()) == pytest.approx(float(d.abs().sum()), rel=1e-5)


def test_della_of_hostile_rows(tmp_path: Path) -> None:
    rows = torch.stack([torch.full((50,), value) for value in (0.0, 1.0, NAN, INF)])[None]
    rows[0, 1, 20] = NAN  # the largest of its row
    each = [{"weight": 1, "density": 0.5, "epsilon": 0.5}]
    got = of_one(tmp_path, "della_linear", rows, each, rescale=False)
    assert got[0].eq(0).all() and got[1, 20].isnan()
    assert set(got[1].nan_to_num(nan=7).tolist()) == {0, 1, 7}
    assert got[2, 0].isnan() and got[2, -1] == 0  # chances of 1 and of 0: the first is the largest
    assert got[3, 0] == INF and got[3, -1] == 0


def test_della_beyond_its_chances(tmp_path: Path) -> None:
    write(tmp_path, *small_states(2))

    def act(**own: Any) -> Callable[[], Any]:
        return lambda: merged(tmp_path, recipe(tmp_path, "della", [{"weight": 1, **own}]))

    text = refusal(act(density=0.9))
    assert "density 0.9 with epsilon 0.15: chances from 0.75 to 1.05, must be from 0 to 1" in text
    assert "chances from -0.1" in refusal(act(density=0.1, epsilon=0.2))
    assert "epsilon" in refusal(act(density=0.5, epsilon=0.6))
    for own in ({"density": 0.85, "epsilon": 0.15}, {"density": 0.3, "epsilon": 0.3}):
        act(**own)()


# -- RAM ------------------------------------------------------------------------------------------


def ram(d: np.ndarray, epsilon: float, r: float = 0.0, alpha: float = 0.0) -> np.ndarray:
    result = np.zeros(d.shape[1:])
    active = np.abs(d) > epsilon
    together = active.sum(0)
    for own, vector in zip(active, d, strict=True):
        unique = (own & (together == 1)).sum()
        factor = 1 + r * min(max((own & (together > 1)).sum() / max(unique, 1), 0), alpha)
        result += own * vector * np.where(together == 1, factor, 1) / np.maximum(together, 1)
    return result


@pytest.mark.parametrize("plus", [{}, {"r": 0.1, "alpha": 0.2}, {"r": 2.0, "alpha": 50.0}])
def test_ram_as_the_oracle_has_it(tmp_path: Path, plus: dict[str, float]) -> None:
    states = small_states(4)
    write(tmp_path, *states)
    method = "ramplus_tl" if plus else "ram"
    got = merged(tmp_path, recipe(tmp_path, method, [{}] * 3, epsilon=1.25, **plus))
    for name, base in states[-1].items():
        d = np.stack([s[name].double().numpy() - base.double().numpy() for s in states[:3]])
        close(got[name], base.double().numpy() + ram(d, 1.25, **plus), 1e-6)


def test_ram_by_hand(tmp_path: Path) -> None:
    d = torch.tensor([[4.0, 2.0, 1.0, 0.0], [0.0, 4.0, 1.0, 0.0]])
    assert of_one(tmp_path, "ram", d, epsilon=1).tolist() == [4.0, 3.0, 0.0, 0.0]  # 1 is not above
    assert of_one(tmp_path, "ram", d).tolist() == [4.0, 3.0, 1.0, 0.0]
    got = of_one(tmp_path, "ramplus_tl", d, r=0.5, alpha=10, epsilon=1)
    assert got.tolist() == [6.0, 3.0, 0.0, 0.0]  # 4 (1 + 0.5 * 1 / 1)
    got = of_one(tmp_path, "ramplus_tl", d, r=0.5, alpha=0.5, epsilon=1)
    assert got.tolist() == [5.0, 3.0, 0.0, 0.0]


@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
def test_ram_of_hostile_tensors(tmp_path: Path, method: str) -> None:
    assert of_one(tmp_path, method, torch.zeros(3, 7)).eq(0).all()
    assert of_one(tmp_path, method, torch.ones(3, 1)).tolist() == [1.0]
    rows = torch.tensor([[NAN, INF, -INF], [0.0, 0.0, 0.0]])
    got = of_one(tmp_path, method, rows)
    assert got[0].isnan() and got[1:].tolist() == [INF, -INF]
    assert of_one(tmp_path, method, torch.full((1, 2, 2), -3.0)).eq(-3).all()


# -- consensus and EMR ----------------------------------------------------------------------------


def test_consensus_by_hand(tmp_path: Path) -> None:
    d = torch.tensor([[1.0, 1.0, 0.0, 2.0], [1.0, 0.0, 0.0, -1.0]])
    # The second expert does not move the second element; of the last, 2 >= 0.4 and 1 >= 0.8.
    assert of_one(tmp_path, "consensus", d).tolist() == [2.0, 0.0, 0.0, 1.0]
    assert of_one(tmp_path, "consensus", d, k=1).tolist() == [2.0, 1.0, 0.0, 1.0]
    each = [{"tall_mask_lambda": 0.4}, {"tall_mask_lambda": 0.6}]  # 1 < 1.2
    assert of_one(tmp_path, "consensus", d, each).tolist() == [2.0, 0.0, 0.0, 0.0]
    half = of_one(tmp_path, "consensus", d, **{"lambda": 0.5})
    assert half.tolist() == [1.0, 0.0, 0.0, 0.5]
    rows = torch.tensor([[NAN, INF], [1.0, 1.0]])
    got = of_one(tmp_path, "consensus", rows)
    assert got[0].isnan() and got[1] == 0  # one expert alone went to infinity


def test_consensus_as_the_oracle_has_it(tmp_path: Path) -> None:
    states = small_states(5)
    write(tmp_path, *states)
    each = [{"weight": w, "tall_mask_lambda": t} for w, t in ((1, 0.5), (0.5, 1), (2, 2), (1, 0))]
    got = merged(tmp_path, recipe(tmp_path, "consensus", each, k=3))
    for name, base in states[-1].items():
        d = np.stack([s[name].double().numpy() - base.double().numpy() for s in states[:4]])
        tau = sum(own["weight"] * v for own, v in zip(each, d, strict=True))
        masks = [
            np.abs(v) >= own["tall_mask_lambda"] * np.abs(tau - v)
            for own, v in zip(each, d, strict=True)
        ]
        close(got[name], base.double().numpy() + tau * (sum(m.astype(int) for m in masks) >= 3))


def test_consensus_of_more_than_there_are(tmp_path: Path) -> None:
    write(tmp_path, *small_states(2))
    text = refusal(lambda: merged(tmp_path, recipe(tmp_path, "consensus", [{}])))
    assert "k must be at most the number of models, 1, got 2" in text


def test_emr_has_the_elected_sign_and_the_largest_magnitude(tmp_path: Path) -> None:
    d = torch.tensor([[3.0, -1.0, 0.0, 5.0], [-1.0, -2.0, 0.0, -3.0], [1.0, 2.0, 0.0, -3.0]])
    assert of_one(tmp_path, "emr", d).tolist() == [3.0, -2.0, 0.0, -3.0]
    assert of_one(tmp_path, "emr", d, **{"lambda": 0.5}).tolist() == [1.5, -1.0, 0.0, -1.5]
    states = small_states(4)
    write(tmp_path, *states)
    got = merged(tmp_path, recipe(tmp_path, "emr", [{}] * 3))
    for name, base in states[-1].items():
        d = torch.stack([s[name].double() - base.double() for s in states[:3]])
        sign = d.sum(0).sign()
        unified = sign * (d * sign).clamp(min=0).amax(0)
        known = sign != 0  # a sum of 0 elects the positive ones
        close(got[name][known], (base.double() + unified)[known])


# -- Arcee Fusion ---------------------------------------------------------------------------------


def importances(x: np.ndarray, base: np.ndarray) -> np.ndarray:
    def log_softmax(v: np.ndarray) -> np.ndarray:
        return v - np.log(np.exp(v).sum(-1, keepdims=True))

    p, q = log_softmax(x), log_softmax(base)
    return np.abs(x - base) * (np.exp(p) * (p - q)).sum(-1, keepdims=True)


@pytest.mark.parametrize("shape", [(17, 9), (40,), (3, 4, 5), (1, 2), (3,), (2, 2), (5,)])
def test_arcee_fusion_as_the_oracle_has_it(tmp_path: Path, shape: tuple[int, ...]) -> None:
    base, x = normal(*shape), normal(*shape, seed=1)
    write(tmp_path, {"x": x}, {"x": base})
    got = merged(tmp_path, recipe(tmp_path, "arcee_fusion", [{}]))["x"]
    scores = importances(x.double().numpy(), base.double().numpy())
    low, middle, high = np.quantile(scores, [0.25, 0.5, 0.75], method="lower")
    taken = torch.from_numpy(scores >= middle + 1.5 * (high - low))
    assert torch.equal(got, torch.where(taken, x, base))


def test_arcee_fusion_of_hostile_tensors(tmp_path: Path) -> None:
    base = {"equal": normal(5, 6), "one": torch.ones(1), "nan": normal(20, 6), "flat": normal(4, 1)}
    x = base | {"one": torch.full((1,), 2.0), "nan": base["nan"] + 1e-3 * normal(20, 6, seed=1)}
    x["flat"] = base["flat"] + 1
    x["nan"][3, 2] = NAN
    write(tmp_path, x, base)
    got = merged(tmp_path, recipe(tmp_path, "arcee_fusion", [{}]))
    assert torch.equal(got["equal"], base["equal"])
    assert got["nan"][3, 2].isnan() and torch.equal(got["nan"][3, :2], x["nan"][3, :2])
    assert got["nan"].isnan().sum() == 1
    # Of one element a softmax is 1: nothing is less important than anything.
    assert got["one"].item() == 2 and torch.equal(got["flat"], x["flat"])


def test_arcee_fusion_ranks_what_is_no_number_above_all(tmp_path: Path) -> None:
    base, x = normal(10, 6), normal(10, 6, seed=1)
    x[2, 3] = x[7, 0] = NAN
    write(tmp_path, {"x": x}, {"x": base})
    got = merged(tmp_path, recipe(tmp_path, "arcee_fusion", [{}]))["x"]
    scores = importances(x.double().numpy(), base.double().numpy())
    scores[np.isnan(scores)] = INF
    low, middle, high = np.quantile(scores, [0.25, 0.5, 0.75], method="lower")
    taken = torch.from_numpy(scores >= middle + 1.5 * (high - low))
    wanted = torch.where(taken, x, base)
    assert torch.equal(got.nan_to_num(nan=99), wanted.nan_to_num(nan=99))


def test_arcee_fusion_compares_with_thresholds_between_numbers_of_fp32() -> None:
    rows = normal(2, 6)
    task = Task("x", (1, 6), 1, True, {})
    score = fusion._importance(Band(0, rows[:, None], slice(6), slice(6)))[2].item()
    for threshold, taken in ((score, True), (score * (1 + 1e-12), False)):
        out = torch.empty(6)
        fusion._fusion(task, fusion.Fused({}, threshold))(Tile(rows, 0), out)
        assert out[2] == rows[0 if taken else 1, 2]


def test_arcee_fusion_is_of_one_model(tmp_path: Path) -> None:
    write(tmp_path, *small_states(3))
    text = refusal(lambda: merged(tmp_path, recipe(tmp_path, "arcee_fusion", [{}] * 2)))
    assert "arcee_fusion merges 1 model besides the base, got 2" in text


# -- means over a run -----------------------------------------------------------------------------


def test_an_ema_is_its_recursion(tmp_path: Path) -> None:
    states = small_states(4)
    write(tmp_path, *states)
    for decay in (0.0, 0.3, 0.9, 1.0):
        got = merged(tmp_path, recipe(tmp_path, "ema", [{}] * 3, base=False, decay=decay))
        for name in SHAPES:
            mean = states[0][name].double()
            for state in states[1:3]:
                mean = decay * mean + (1 - decay) * state[name].double()
            close(got[name], mean)
        assert sum(ema_weights(7, decay)) == pytest.approx(1)
    assert ema_weights(1, 0.3) == [1]


def test_weights_of_wsm_emulate_a_schedule() -> None:
    schedules: dict[str, Callable[[float], float]] = {
        "linear": lambda x: 1 - x,
        "1-sqrt": lambda x: 1 - x**0.5,
        "cosine": lambda x: 0.5 + 0.5 * np.cos(np.pi * x),
    }
    for schedule, rate in schedules.items():
        for n in (1, 2, 5, 12):
            weights = wsm_weights(n, schedule)
            assert len(weights) == n and min(weights) > 0
            for i in range(n):  # step i is in all checkpoints from i on
                assert sum(weights[i:]) == pytest.approx(rate(i / n), abs=1e-12)
    assert wsm_weights(4, "linear") == pytest.approx([0.25] * 4)
    assert wsm_weights(4, "1-sqrt") == pytest.approx([0.5, 0.2071068, 0.1589186, 0.1339746])


def test_wsm_is_a_decay_of_the_steps_between(tmp_path: Path) -> None:
    states = small_states(5)
    write(tmp_path, *states)
    got = merged(tmp_path, recipe(tmp_path, "wsm", [{}] * 4, base=False, schedule="1-sqrt"))
    for name in SHAPES:
        wanted = states[0][name].double()
        for i in range(1, 4):
            step = states[i][name].double() - states[i - 1][name].double()
            wanted = wanted + (1 - (i / 4) ** 0.5) * step
        close(got[name], wanted, 1e-6)
    mean = merged(tmp_path, recipe(tmp_path, "wsm", [{}] * 4, base=False))
    linear = merged(tmp_path, recipe(tmp_path, "linear", [{"weight": 1}] * 4, base=False))
    assert all(torch.equal(mean[name], linear[name]) for name in SHAPES)


@pytest.mark.parametrize(
    ("method", "more", "part"),
    [
        ("wsm", {"schedule": "liner"}, "must be one of linear, 1-sqrt, cosine, got 'liner'"),
        ("wsm", {"schedule": "liner"}, "did you mean 'linear'?"),
        ("wsm", {"schedule": 1}, "schedule must be a word, got 1"),
        ("ema", {}, "decay is missing"),
        ("ema", {"decay": 1.5}, "decay must be a number from 0 to 1, got 1.5"),
        ("ramplus_tl", {"r": -1}, "r must be a number of at least 0, got -1"),
        ("consensus", {"k": 1.5}, "k must be a whole number of at least 0, got 1.5"),
    ],
)
def test_parameters_that_cannot_be(
    tmp_path: Path, method: str, more: dict[str, Any], part: str
) -> None:
    write(tmp_path, *small_states(3))
    assert part in refusal(lambda: merged(tmp_path, recipe(tmp_path, method, [{}] * 2, **more)))


# -- Fisher ---------------------------------------------------------------------------------------


def fishers(folder: Path, *states: State, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Written as f0 ...; what models are told of them."""
    for i, state in enumerate(states):
        samples.write(folder / f"f{i}", state, dtype, shards=1)
    return [{"fisher": str(folder / f"f{i}")} for i in range(len(states))]


def test_fisher_as_the_oracle_has_it(tmp_path: Path) -> None:
    states = small_states(3)
    write(tmp_path, *states)
    squares = [{n: (0.1 * t.square()) for n, t in state.items()} for state in small_states(5)[3:]]
    each = fishers(tmp_path, *squares)
    each[1]["weight"] = 2.5
    for floor in (0.0, 0.05):
        got = merged(tmp_path, recipe(tmp_path, "fisher", each, base=False, floor=floor))
        for name in SHAPES:
            x = np.stack([state[name].double().numpy() for state in states[:2]])
            f = np.maximum(np.stack([state[name].double().numpy() for state in squares]), floor)
            w = np.array([1, 2.5]).reshape(2, *[1] * (x.ndim - 1))
            total = (w * f).sum(0)
            wanted = np.where(total, (w * f * x).sum(0) / np.where(total, total, 1), np.nan)
            close(got[name], np.where(np.isnan(wanted), (w * x).sum(0) / 3.5, wanted), 1e-6)


def test_fisher_of_nothing_is_the_mean(tmp_path: Path) -> None:
    write(tmp_path, {"x": torch.tensor([1.0, 4.0])}, {"x": torch.tensor([3.0, 0.0])}, {})
    each = fishers(tmp_path, {"x": torch.tensor([0.0, 3.0])}, {"x": torch.tensor([0.0, 1.0])})
    got = merged(tmp_path, recipe(tmp_path, "fisher", each, base=False, floor=0))["x"]
    assert got.tolist() == [2.0, 3.0]
    got = merged(tmp_path, recipe(tmp_path, "fisher", each, base=False, floor=10))["x"]
    assert got.tolist() == [2.0, 2.0]
    each = fishers(tmp_path, {"x": torch.tensor([NAN, 3.0])}, {"x": torch.tensor([0.0, 1.0])})
    got = merged(tmp_path, recipe(tmp_path, "fisher", each, base=False))["x"]
    assert got[0].isnan() and got[1] == 3


def test_fisher_is_read_exactly_beside_other_types(tmp_path: Path) -> None:
    states = [{"x": normal(20, seed=i), "ids": torch.arange(3) + i} for i in range(2)]
    write(tmp_path, *states, {}, dtype=torch.bfloat16)
    each = fishers(tmp_path, {"x": normal(20, seed=7).abs()}, {"x": normal(20, seed=8).abs()})
    got = merged(tmp_path, recipe(tmp_path, "fisher", each, base=False))
    x = [state["x"].bfloat16().double() for state in states]
    f = [normal(20, seed=seed).abs().double().clamp(min=1e-6) for seed in (7, 8)]
    close(got["x"], (f[0] * x[0] + f[1] * x[1]) / (f[0] + f[1]), 1e-6)
    assert torch.equal(got["ids"], torch.arange(3))


def test_fisher_by_layers(tmp_path: Path) -> None:
    """A slice's Fisher information is of the layers that the slice takes."""
    key = "model.layers.{}.w"
    states = [{key.format(i): torch.full((2,), 10.0 * m + i) for i in range(3)} for m in range(2)]
    write(tmp_path, *states, {})
    flat = [{key.format(i): torch.full((2,), float(i + m)) for i in range(3)} for m in range(2)]
    each = fishers(tmp_path, *flat)
    sources = [
        {"model": str(tmp_path / f"m{m}"), "layer_range": [1 - m, 2 - m], "parameters": each[m]}
        for m in range(2)
    ]
    got = merged(tmp_path, {"merge_method": "fisher", "slices": [{"sources": sources}]})
    assert got[key.format(0)].tolist() == [(1 * 1 + 1 * 10) / 2] * 2


def test_fisher_that_does_not_fit_is_named(tmp_path: Path) -> None:
    write(tmp_path, *small_states(3))
    wrong = dict(small_states(1)[0])
    wrong["a"] = torch.zeros(9, 6)
    del wrong["v"]
    each = fishers(tmp_path, small_states(1)[0], wrong)
    text = refusal(lambda: merged(tmp_path, recipe(tmp_path, "fisher", each, base=False)))
    assert f"{tmp_path / 'f1'} has no 'v'" in text
    assert f"[9, 6] in {tmp_path / 'f1'}" in text
    text = refusal(lambda: merged(tmp_path, recipe(tmp_path, "fisher", [{}, each[1]], base=False)))
    assert f"fisher for {tmp_path / 'm0'} is missing" in text
    each[0] = {"fisher": 3}
    text = refusal(lambda: merged(tmp_path, recipe(tmp_path, "fisher", each, base=False)))
    assert "models.0.parameters.fisher: must be text, got 3" in text
    each = [own | {"weight": 0} for own in fishers(tmp_path, *small_states(2))]
    text = refusal(lambda: merged(tmp_path, recipe(tmp_path, "fisher", each, base=False)))
    assert "weights [0, 0] sum to zero" in text
    each[0] = {"fisher": str(tmp_path / "nowhere")}
    text = refusal(lambda: merged(tmp_path, recipe(tmp_path, "fisher", each, base=False)))
    assert "nowhere: no such folder" in text


def test_a_changed_fisher_is_another_merge(tmp_path: Path) -> None:
    write(tmp_path, *small_states(3))
    config = recipe(tmp_path, "fisher", fishers(tmp_path, *small_states(2)), base=False)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nf.merge(config, tmp_path / "out", threads=1, progress=stop)
    fishers(tmp_path, *small_states(5)[3:])
    assert "holds an interrupted merge that differs" in refusal(lambda: merged(tmp_path, config))


def test_fisher_does_not_differ_between_outputs(tmp_path: Path) -> None:
    write(tmp_path, *small_states(3))
    each = fishers(tmp_path, *small_states(2))
    config = recipe(tmp_path, "fisher", each, base=False)
    other = {"models": {"m0": {"fisher": str(tmp_path / "f1")}}}
    config["neulig_fast"] = {"outputs": {"even": {}, "other": other}}
    assert "is read once for all outputs" in refusal(lambda: nf.merge(config, tmp_path / "out"))


@pytest.mark.parametrize(
    ("method", "each", "more", "part"),
    [
        ("ram", {"weight": 0}, {}, "weight: ram has no such parameter"),
        ("emr", {"lambda": 0.1}, {}, "lambda: is of the merge, not of a model"),
    ],
)
def test_settings_that_nothing_reads_are_warned_of(
    tmp_path: Path, method: str, each: dict[str, Any], more: dict[str, Any], part: str
) -> None:
    write(tmp_path, *small_states(3))
    report = nf.merge(recipe(tmp_path, method, [each] * 2, **more), tmp_path / "out")
    assert any(part in text for text in report.warnings)
