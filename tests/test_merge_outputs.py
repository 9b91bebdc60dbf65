"""Several results of one reading: each as if it were the only one, inputs read once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from typer.testing import CliRunner

import neulig_fast as nf
from neulig_fast.checkpoints import measured, read, resources, tiles, workspace
from neulig_fast.checkpoints.companions import all_companions
from neulig_fast.checkpoints.manifest import verify
from neulig_fast.checkpoints.prepared import prepare
from neulig_fast.cli import app
from neulig_fast.demo import llamas
from neulig_fast.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("m0", "m1", "m2")
ULP = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, dict[str, Tensor]]:
    return llamas.family(tmp_path, layers=1, width=8)


def recipe(folder: Path, method: str, ours: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    each = more.pop("each", {"weight": 1.0})
    names = more.pop("names", NAMES)
    listed = [{"model": str(folder / name), "parameters": dict(each)} for name in names]
    if METHODS[method].base == "needed":
        more["base_model"] = str(folder / "base")
    return {"merge_method": method, "models": listed, **more, "neulig_fast": dict(ours)}


def merged(config: Mapping[str, Any], out: Path, **options: Any) -> dict[str, dict[str, Tensor]]:
    report = nf.merge(config, out, **options)
    for one in report.outputs.values():
        verify(one.folder)
    return {name: llamas.load(one.folder) for name, one in report.outputs.items()}


def assert_close(got: Tensor, wanted: Tensor) -> None:
    """One rounding of an almost exact value."""
    scale = wanted.abs() * ULP[got.dtype] + 1e-6 * wanted.abs().mean()
    assert ((got.double() - wanted).abs() <= scale.clamp(min=1e-12)).all()


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(ValueError) as caught:
        act()
    return str(caught.value)


# -- each is a merge of its own -------------------------------------------------------------------

EVERY: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "linear": ({"a": {"models": {"m0": {"weight": 0.2}}}, "b": {}}, {}),
    "task_arithmetic": ({"a": {"parameters": {"lambda": 0.5}}, "b": {}}, {}),
    "ties": (
        {"a": {"parameters": {"density": 0.2}}, "b": {"parameters": {"lambda": 2, "density": 0.5}}},
        {},
    ),
    "dare_ties": (
        {"a": {"parameters": {"density": 0.2}}, "b": {"parameters": {"weight": 0.1}}},
        {"each": {"weight": 1.0, "density": 0.5}},
    ),
    "breadcrumbs": ({"a": {"parameters": {"gamma": 0.2, "density": 0.5}}, "b": {}}, {}),
    "slerp": (
        {"a": {"parameters": {"t": 0.2}}, "b": {"parameters": {"t": [0, 1]}}},
        {"names": ["m0"], "each": {}},
    ),
    "multislerp": ({"a": {"models": {"m2": {"weight": 3}}}, "b": {}}, {}),
    "karcher": ({"a": {}, "b": {"parameters": {"tol": 10}}}, {"each": {}}),
    "sce": ({"a": {"parameters": {"select_topk": 0.3}}, "b": {}}, {"each": {}}),
    "wise_ft": ({"a": {"parameters": {"alpha": 0.3}}, "b": {}}, {"names": ["m0"], "each": {}}),
}


@pytest.mark.parametrize("method", EVERY)
def test_each_result_is_what_its_own_recipe_gives(tmp_path: Path, models: Any, method: str) -> None:
    outputs, more = EVERY[method]
    config = recipe(tmp_path, method, {"outputs": outputs}, dtype="float32", **more)
    report = nf.merge(config, tmp_path / "out", shard_size=2000)
    assert list(report.outputs) == ["a", "b"]
    assert report.resumed == 0 and report.warnings == ()
    for name, one in report.outputs.items():
        assert one.folder == tmp_path / "out" / name
        manifest = verify(one.folder)
        assert len(manifest.tensors) == one.tensors
        alone = nf.merge(one.folder / "mergekit_config.yml", tmp_path / name, shard_size=2000)
        assert not alone.outputs
        assert llamas.contents(one.folder) == llamas.contents(tmp_path / name)
    first, second = (llamas.load(tmp_path / name) for name in ("a", "b"))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b"]


def test_a_sweep_of_task_arithmetic_in_closed_form(tmp_path: Path, models: Any) -> None:
    config = recipe(tmp_path, "task_arithmetic", {"sweep": {"lambda": [0.3, 1, 0]}})
    found = merged(config | {"dtype": "float32"}, tmp_path / "out")
    assert list(found) == ["lambda=0.3", "lambda=1", "lambda=0"]
    for name, state in found.items():
        lam = float(name.partition("=")[2])
        for tensor, got in state.items():
            base = models["base"][tensor].double()
            deltas = [models[m][tensor].double() - base for m in NAMES]
            assert_close(got, base + lam * sum(deltas))


def test_results_of_one_tokenizer_hold_it_once(tmp_path: Path, models: Any) -> None:
    for name in ("base", *NAMES):
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"of": name}))
    config = recipe(tmp_path, "task_arithmetic", {"sweep": {"lambda": [0.5, 1, 2]}})
    texts = [*all_companions(prepare(config), tmp_path / "out").values()]
    assert len(texts) == 3 and len({id(each["tokenizer.json"]) for each in texts}) == 1
    merged(config, tmp_path / "out")
    for kept in (tmp_path / "out").glob("*/tokenizer.json"):
        assert kept.read_bytes() == texts[0]["tokenizer.json"] == b'{"of": "base"}'


def test_a_sweep_is_of_all_combinations(tmp_path: Path, models: Any) -> None:
    sweep = {"density": [0.2, 1], "lambda": [0.5, 2], "normalize": [True, False]}
    config = recipe(tmp_path, "ties", {"sweep": sweep})
    names = list(nf.merge(config, tmp_path / "out").outputs)
    assert len(names) == 8
    assert names[0] == "density=0.2,lambda=0.5,normalize=true"
    assert names[-1] == "density=1,lambda=2,normalize=false"
    text = yaml.safe_load((tmp_path / "out" / names[-1] / "mergekit_config.yml").read_text())
    assert text["parameters"] == {"lambda": 2, "normalize": False}
    assert [m["parameters"]["density"] for m in text["models"]] == [1, 1, 1]
    assert "neulig_fast" not in text


def test_windows_of_a_run_are_means_of_their_checkpoints(tmp_path: Path, models: Any) -> None:
    windows = {f"to-{i + 1}": NAMES[i : i + 2] for i in range(2)}
    outputs = {name: {"models": {m: {"weight": 1} for m in own}} for name, own in windows.items()}
    config = recipe(
        tmp_path, "linear", {"outputs": outputs}, each={}, parameters={"weight": 0}, dtype="float32"
    )
    for name, state in merged(config, tmp_path / "out").items():
        for tensor, got in state.items():
            assert_close(got, sum(models[m][tensor].double() for m in windows[name]) / 2)


def test_the_nearest_value_wins_and_filters_leave_the_rest_to_the_file(
    tmp_path: Path, models: Any
) -> None:
    outputs = {
        "one": {"parameters": {"weight": 2}, "models": {"m1": {"weight": 5}}},
        "two": {"models": {"m0": {"weight": {"filter": "mlp", "value": 3}}}},
        "three": {"parameters": {"weight": [{"filter": "mlp", "value": 4}]}},
    }
    config = recipe(
        tmp_path,
        "linear",
        {"outputs": outputs},
        each={"weight": [{"filter": "lm_head", "value": 7}, {"value": 1}]},
        names=["m0", "m1"],
        dtype="float32",
    )
    wanted = {
        "one": {"mlp.up_proj": (2, 5), "lm_head": (2, 5)},
        "two": {"mlp.up_proj": (3, 1), "lm_head": (7, 7), "q_proj": (1, 1)},
        "three": {"mlp.up_proj": (4, 4), "lm_head": (7, 7), "q_proj": (1, 1)},
    }
    found = merged(config, tmp_path / "out")
    for name, parts in wanted.items():
        for part, (u, v) in parts.items():
            tensor = next(tensor for tensor in found[name] if part in tensor)
            total = u * models["m0"][tensor].double() + v * models["m1"][tensor].double()
            assert_close(found[name][tensor], total / (u + v))


def test_a_slices_own_parameters_give_way(tmp_path: Path) -> None:
    models = llamas.family(tmp_path, 1, layers=2, width=8)
    sources = [{"model": str(tmp_path / name), "layer_range": [0, 2]} for name in ("base", "m0")]
    config = {
        "merge_method": "slerp",
        "base_model": str(tmp_path / "base"),
        "slices": [{"sources": sources, "parameters": {"t": 0.5}}],
        "neulig_fast": {"sweep": {"t": [0, 1]}},
    }
    found = merged(config, tmp_path / "out")
    for name, model in (("t=0", "base"), ("t=1", "m0")):
        for tensor, got in found[name].items():
            torch.testing.assert_close(got, models[model][tensor], rtol=2**-7, atol=1e-6)


# -- inputs are read once -------------------------------------------------------------------------


def bytes_read(config: Mapping[str, Any], out: Path, patch: pytest.MonkeyPatch) -> int:
    count = 0
    whole = read.Reader._fill

    def counted(self: Any, entry: Any, offset: int, memory: memoryview) -> None:
        nonlocal count
        count += len(memory)
        whole(self, entry, offset, memory)

    with patch.context() as own:
        own.setattr(read.Reader, "_fill", counted)
        nf.merge(config, out, threads=1)
    return count


@pytest.mark.parametrize("small", [False, True])
def test_every_byte_is_read_once_for_any_number_of_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    models = llamas.family(tmp_path, layers=1, width=8, words=40_000)
    if small:
        block = 1 << 16
        monkeypatch.setattr(tiles, "_STREAMED", block)
        monkeypatch.setattr(
            tiles, "tile_elements", lambda planned, memory: min(block, planned.output.elements)
        )
    inputs = sum(t.nbytes for state in models.values() for t in state.values())
    for k in (1, 5):
        config = recipe(
            tmp_path, "task_arithmetic", {"sweep": {"lambda": [i / 4 for i in range(k)]}}
        )
        assert bytes_read(config, tmp_path / f"out{k}", monkeypatch) == inputs


@pytest.mark.parametrize(
    ("sweep", "times"),
    [
        ({"lambda": [0.5, 1, 2], "normalize": [True, False]}, 1),
        ({"weight": [0.5, 1, 2]}, 1),
        ({"density": [0.2, 0.5]}, 2),
        ({"density": [0.2, 0.5], "lambda": [1, 2]}, 2),
    ],
)
def test_what_does_not_change_is_measured_once(
    tmp_path: Path, models: Any, monkeypatch: pytest.MonkeyPatch, sweep: Any, times: int
) -> None:
    asked = []
    measure = tiles.Tiles.measure

    def counted(self: Any, statistic: Any) -> Any:
        asked.append(self._planned.output.name)
        return measure(self, statistic)

    monkeypatch.setattr(tiles.Tiles, "measure", counted)
    config = recipe(tmp_path, "ties", {"sweep": sweep}, each={"weight": 1.0, "density": 0.3})
    nf.merge(config, tmp_path / "out")
    assert sorted(asked) == sorted([*models["base"]] * times)


def test_settings_that_were_read_are_known() -> None:
    observed = measured._Observed({"density": [0.1], "lambda": 1.0, "rescale": False})
    assert observed.get("gamma") is None
    assert observed["density"] == [0.1]
    assert observed.read == {"density"}
    assert len(dict(observed)) == 3
    assert observed.read == {"density", "lambda", "rescale"}


@pytest.mark.parametrize("method", ["ties", "dare_ties", "sce"])
def test_bits_depend_on_neither_threads_nor_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    llamas.family(tmp_path, layers=1, width=8, words=20_000)
    name, values = ("select_topk", [0.3, 1]) if method == "sce" else ("density", [0.3, 0.6])
    config = recipe(
        tmp_path,
        method,
        {"sweep": {name: values}},
        each={} if method == "sce" else {"weight": 0.5},
    )
    nf.merge(config, tmp_path / "whole", threads=1)
    block = 1 << 16
    monkeypatch.setattr(tiles, "_STREAMED", block)
    monkeypatch.setattr(
        tiles, "tile_elements", lambda planned, memory: min(block, planned.output.elements)
    )
    nf.merge(config, tmp_path / "tiles", threads=3)
    for value in values:
        folder = f"{name}={value}"
        whole, parts = (llamas.contents(tmp_path / out / folder) for out in ("whole", "tiles"))
        assert whole == parts


def test_memory_does_not_depend_on_the_number_of_results(
    tmp_path: Path, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []
    planned = tiles.tile_elements

    def spy(tensor: Any, memory: int) -> int:
        asked.append((tensor.output.name, memory))
        return planned(tensor, memory)

    monkeypatch.setattr(tiles, "tile_elements", spy)
    for k in (1, 4):
        config = recipe(tmp_path, "ties", {"sweep": {"lambda": list(range(1, k + 1))}})
        nf.merge(config, tmp_path / f"out{k}", max_ram="128M", threads=1)
    half = len(asked) // 2
    assert asked[:half] == asked[half:]
    slow = resources.in_pytorch(torch.device("cpu"))
    tensors = prepare(config)[0].plan.tensors
    formulas = max(workspace.beside_bytes(tensor, slow) for tensor in tensors)
    share = (64 << 20) - resources.THREAD - formulas
    assert {memory for _, memory in asked} == {share}


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "part"),
    [
        ({"outputs": {"a": {}}, "sweep": {"lambda": [1]}}, "one of outputs and sweep at most"),
        ({"outputs": {}}, "outputs: must be a mapping of names of folders, got {}"),
        ({"outputs": None}, "outputs: must be a mapping of names of folders, got None"),
        ({"outputs": {"../a": {}}}, "letters, digits, _ . + = , and -, got '../a'"),
        ({"outputs": {".merging": {}}}, "got '.merging'"),
        ({"outputs": {"a/b": {}}}, "got 'a/b'"),
        ({"outputs": {"a" * 201: {}}}, "letters, digits"),
        ({"outputs": {False: {}}}, "put the name in quotes"),
        ({"outputs": {1: {}, "1": {}}}, "two names are the same folder's"),
        ({"outputs": {"a": 3}}, "outputs.a: must be a mapping, got 3"),
        ({"outputs": {"a": {"parameter": {}}}}, "did you mean 'parameters'?"),
        ({"outputs": {"a": {"parameters": 3}}}, "a.parameters: must be a mapping, got 3"),
        (
            {"outputs": {"a": {"parameters": {"lamda": 1}}}},
            "a.parameters.lamda: task_arithmetic has no such parameter; did you mean 'lambda'?",
        ),
        ({"outputs": {"a": {"parameters": {"density": 1}}}}, "has no such parameter"),
        ({"outputs": {"a": {"parameters": {"lambda": []}}}}, "got an empty list"),
        (
            {"outputs": {"a": {"models": {"m7": {"weight": 1}}}}},
            "a.models.m7: there is no such model (known: ",
        ),
        ({"outputs": {"a": {"models": {"0": {"weight": 1}}}}}, "there is no such model"),
        ({"outputs": {"a": {"models": {"base": {"weight": 1}}}}}, "there is no such model"),
        ({"outputs": {"a": {"models": {"m0": {"lambda": 1}}}}}, "it belongs under parameters"),
        ({"outputs": {"a": {"models": {"m0": 1}}}}, "models.m0: must be a mapping, got 1"),
        ({"sweep": []}, "sweep: must be a mapping of parameters to lists"),
        ({"sweep": {"lambda": 1}}, "sweep.lambda: must be a list of values, got 1"),
        ({"sweep": {"lambda": []}}, "must be a list of values, got []"),
        ({"sweep": {"lambda": [[0, 1]]}}, "one value in each place, got [0, 1]"),
        ({"sweep": {"lambda": [1, 1.0]}}, "has 1.0 twice"),
        ({"sweep": {"lambda": [float("nan")]}}, "must be a finite number"),
        ({"sweep": {"lambda": list(range(40)), "weight": list(range(40))}}, "at most, got 1600"),
        ({"sweep": {"lambd": [1]}}, "did you mean 'lambda'?"),
        ({"swep": {}}, "neulig_fast.swep: unknown key; did you mean 'sweep'?"),
    ],
)
def test_what_cannot_be_asked_for(tmp_path: Path, ours: dict[str, Any], part: str) -> None:
    config = recipe(tmp_path, "task_arithmetic", ours)
    assert part in refusal(lambda: nf.merge(config, tmp_path / "o"))
    assert not (tmp_path / "o").exists()


def test_a_part_of_a_path_must_name_one_model(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        llamas.family(tmp_path / folder, 1, layers=1, width=8)
    listed = [{"model": str(tmp_path / f / "m0"), "parameters": {"weight": 1}} for f in "xy"]
    config = {"merge_method": "linear", "models": listed}
    ours = {"outputs": {"a": {"models": {"m0": {"weight": 2}}}}}
    text = refusal(lambda: nf.merge(config | {"neulig_fast": ours}, tmp_path / "out"))
    assert "x/m0 or " in text and "write more of it" in text
    ours = {"outputs": {"a": {"models": {"x/m0": {"weight": 2}, str(tmp_path / "x/m0"): {}}}}}
    text = refusal(lambda: nf.merge(config | {"neulig_fast": ours}, tmp_path / "out"))
    assert "x/m0 has parameters here already" in text


def test_faults_of_all_results_come_at_once(tmp_path: Path, models: Any) -> None:
    outputs = {
        "a": {"parameters": {"lambda": "high"}},
        "b": {"models": {"m0": {"weight": True}}},
        "c": {},
        "d": {"parameters": {"lambda": "high"}},
    }
    config = recipe(tmp_path, "task_arithmetic", {"outputs": outputs})
    text = refusal(lambda: nf.merge(config, tmp_path / "out"))
    assert "2 problems" in text
    assert "a, d: lambda must be a number, got 'high'" in text
    assert "b: weight for" in text
    common = config | {"neulig_fast": {"outputs": {"a": {}, "b": {}}, "parity": "none"}}
    text = refusal(lambda: nf.merge(common, tmp_path / "out"))
    assert text.startswith("merge: neulig_fast.parity")


# -- as a user sees it ----------------------------------------------------------------------------


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llamas.family(tmp_path / "models", layers=1, width=8)
    run = CliRunner()
    config = str(ROOT / "examples/sweep.yml")
    planned = run.invoke(app, ["merge", config, "sweep", "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "(4 results of" in planned.output
    assert not (tmp_path / "sweep").exists()
    done = run.invoke(app, ["merge", config, "sweep"])
    assert done.exit_code == 0, done.output
    for value in (0.2, 0.3, 0.4, 0.5):
        folder = f"sweep/lambda={value}"
        assert f"{folder}: 12 tensors\n" in done.output
        checked = run.invoke(app, ["verify", folder])
        assert checked.exit_code == 0, checked.output


def section(title: str) -> str:
    page = (ROOT / "docs/merge.md").read_text()
    return page.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_pages_recipes_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    llamas.family(tmp_path / "models", layers=1, width=8)
    found = re.findall(r"```yaml\n(.*?)```", section("Several results of one reading"), flags=re.S)
    assert len(found) >= 3
    for number, text in enumerate(found):
        Path("recipe.yml").write_text(text)
        report = nf.merge("recipe.yml", f"out{number}")
        assert len(report.outputs) > 1
        for one in report.outputs.values():
            verify(one.folder)
