"""Pages of merge methods: tables are those of METHODS, recipes run, links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import neulig_fast as nf
from neulig_fast.checkpoints import tiles
from neulig_fast.checkpoints.forecast import passes
from neulig_fast.checkpoints.prepared import prepare
from neulig_fast.checkpoints.read import Reader
from neulig_fast.demo import llamas
from neulig_fast.methods import BLOCK, METHODS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted((DOCS / "methods").glob("*.md"))
GUIDE = DOCS / "migrate-from-mergekit.md"


def recipes(page: Path) -> list[str]:
    """Those of a page, without parts of recipes."""
    found = re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.S)
    return [text for text in found if "merge_method" in text]


RECIPES = [
    pytest.param(text, id=f"{page.stem}-{k}")
    for page in (*PAGES, GUIDE)
    for k, text in enumerate(recipes(page))
]


@pytest.fixture(scope="module")
def tables() -> Any:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "tools/method_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [*PAGES, DOCS / "merge.md"], ids=lambda page: page.stem)
def test_tables_of_methods_are_those_of_the_code(tables: Any, page: Path) -> None:
    text = page.read_text()
    assert text.count("<!-- methods: ") == text.count("<!-- end of methods -->") >= 1
    assert text == tables.rendered(text), "run `python tools/method_tables.py`"


def test_every_method_has_its_place_and_a_recipe(tables: Any) -> None:
    blocks = [re.findall(r"<!-- methods: (.*?) -->", page.read_text()) for page in PAGES]
    named = Counter(" ".join(text for page in blocks for text in page).split())
    assert named == dict.fromkeys(METHODS, 1)
    for name, page in tables.pages().items():
        methods = {yaml.safe_load(text)["merge_method"] for text in recipes(page)}
        assert name in methods, f"{page}: no recipe of {name}"
        assert re.search(rf"^#+ .*(`{name}`|Layers|Fisher)", page.read_text(), flags=re.M), name


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the recipes name."""
    root = tmp_path_factory.mktemp("pages")
    states = llamas.family(root / "models", layers=4, width=8)
    for name in ("m0", "m1"):
        squares = {key: tensor.float().square() for key, tensor in states[name].items()}
        llamas.write(root / "fisher" / name, squares)
    module = "base_model.model.model.layers.1.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 8)}
    factors |= {f"{module}.lora_B.weight": torch.ones(8, 2)}
    (root / "models/lora").mkdir()
    save_file(factors, root / "models/lora/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    (root / "models/lora/adapter_config.json").write_text(json.dumps(config))
    pool = nf.ExpertPool([torch.nn.Linear(2, 2) for _ in range(3)], names=["m0", "m1", "m2"])
    engine = nf.NeuLig(pool, {"cars": nf.Head(torch.ones(2, 2))})
    engine.calibration = {"cars": torch.tensor([0.5, 0.3, 0.2])}
    engine.save(root / "engine")
    return root


@pytest.mark.parametrize("text", RECIPES)
def test_recipes_run_and_nothing_of_them_is_unread(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.chdir(models)
    (tmp_path / "recipe.yml").write_text(text)
    report = nf.merge(tmp_path / "recipe.yml", tmp_path / "out")
    assert report.warnings == ()
    for folder in [one.folder for one in report.outputs.values()] or [tmp_path / "out"]:
        assert all(tensor.isfinite().all() for tensor in llamas.load(folder).values())


# A value for what must be given, and values with which a method has most to do.
VALUES = {"weight": 0.5, "scale": 1.0, "t": 0.5, "decay": 0.5, "fisher": "b.safetensors"}
OURS = {"pcb": {"scope": "tensor"}}
VALUES |= {"density": 0.5, "gamma": 0.1, "select_topk": 0.5, "rescale": True}


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"neulig"}))
def test_reads_of_tensors_beyond_memory_are_as_foreseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    method, rows = METHODS[name], torch.randn(4, 2, BLOCK)
    for key, row in zip(("b", "m0", "m1", "m2"), rows, strict=True):
        save_file({"x": row}, f"{key}.safetensors")
    monkeypatch.setattr(
        tiles, "tile_elements", lambda planned, memory: min(BLOCK, planned.output.elements)
    )
    reads: Counter[tuple[Path, int]] = Counter()
    read = Reader.read

    def counted(self: Reader, entry: Any, start: int, *rest: Any) -> None:
        reads[entry.file, start] += 1
        read(self, entry, start, *rest)

    monkeypatch.setattr(Reader, "read", counted)
    count = min(method.most or 2, 2)
    config = {
        "merge_method": name,
        "models": [{"model": f"m{i}.safetensors"} for i in range(count)],
    }
    config["parameters"] = {key: VALUES[key] for key in method.parameters if key in VALUES}
    config |= {"base_model": "b.safetensors", "neulig_fast": OURS.get(name, {})}
    nf.merge(config, "out")
    experts = {times for (file, _), times in reads.items() if file.name != "b.safetensors"}
    expected = 1 + passes([one.plan for one in prepare(config)])
    # The last tie of some rows is looked for in the one tile that has it.
    assert min(experts) == expected >= max(experts) - 1


@pytest.mark.parametrize("name", ["ties", "breadcrumbs"])
@pytest.mark.parametrize("rescale", [False, True])
def test_the_page_tells_how_often_thresholds_have_a_tensor_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rescale: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "methods/task-vectors.md").read_text()
    told = re.search(rf"^\|.*`{name}`.* \| (\d+) \(fp64: (\d+)\), and 1 more", page, re.MULTILINE)
    assert told is not None
    for dtype, count in zip((torch.float32, torch.float64), told.groups(), strict=True):
        for key in ("b", "m0"):
            save_file({"x": torch.randn(99, dtype=dtype)}, f"{key}.safetensors")
        config = {"merge_method": name, "models": [{"model": "m0.safetensors"}]}
        config |= {"base_model": "b.safetensors"}
        config["parameters"] = {"weight": 1.0, "density": 0.5, "gamma": 0.1, "rescale": rescale}
        assert 1 + passes([one.plan for one in prepare(config)]) == int(count) + rescale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.2, 1.0])
@pytest.mark.parametrize(("name", "trimmed"), [("ties", "density"), ("dare_ties", "threshold")])
def test_the_page_tells_how_often_fusionbenchs_ties_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    trimmed: str,
    share: float,
    dtype: torch.dtype,
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "methods/task-vectors.md").read_text()
    row = r"`dare_ties` with FusionBench.* \| (\d+) \(fp64: (\d+)\), and (\d+) where"
    told = re.search(row, page, re.MULTILINE)
    assert told is not None
    for key in ("b", "m0"):
        save_file({"x": torch.randn(99, dtype=dtype)}, f"{key}.safetensors")
    config = {"merge_method": name, "models": [{"model": "m0.safetensors"}]}
    config |= {"base_model": "b.safetensors", "neulig_fast": {"parity": "fusionbench"}}
    config["parameters"] = {"weight": 1.0, "density": 0.5, trimmed: share}
    trimming = told[2] if dtype == torch.float64 else told[1]
    count = trimming if share < 1 else told[3]
    assert 1 + passes([one.plan for one in prepare(config)]) == int(count)


def slugs(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"], ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, place = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not place or place in slugs(target), link
