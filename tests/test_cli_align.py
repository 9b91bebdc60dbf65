"""``neulig-fast align``: whole runs on toy experts, how it ends when it must, what it refuses."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from neulig_fast.align_config import AlignConfig, load_config
from neulig_fast.alignment import Alignment, random_permutation, spec_for
from neulig_fast.alignment.activations import ActivationMoments
from neulig_fast.alignment.weights import WeightSimilarity
from neulig_fast.cli import app

ROOT = Path(__file__).resolve().parents[1]
VIT = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 1, "layers": 1},
}
RESNET = {
    **VIT,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
}


# -- experts and images ---------------------------------------------------------------------------


def clip_model(folder, name, config, seed=0):
    """A model whose config is ``folder/<name>.json``; its norms are not idle."""
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    torch.manual_seed(seed)
    model = open_clip.create_model(name).eval()
    with torch.no_grad():
        for tensor in model.visual.state_dict().values():
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.add_(0.3 * torch.rand_like(tensor))
    return model


def moved(model, seed):
    """The model's state dict with its image tower's units in another order, and another text."""
    visual, _ = random_permutation(model.visual, spec_for(model.visual), seed)
    state = {f"visual.{k}": v for k, v in visual.state_dict().items()}
    return {k: state.get(k, v + seed) for k, v in model.state_dict().items()}


def tower(state):
    return {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}


def images(root, count, classes=("x", "y/deep")):
    rng = np.random.default_rng(0)
    for k in range(count):
        path = root / classes[k % len(classes)] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray(rng.integers(0, 255, (18, 20, 3), np.uint8))
        pixels.convert("RGB" if k else "L").save(path)


def batch_of(paths, transform):
    return torch.stack([transform(Image.open(path)) for path in paths])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two unrelated experts, ``one`` and ``two``, and ``one`` in other orders, in three formats."""
    folder = tmp_path_factory.mktemp("made")
    one = clip_model(folder, "toy-align", VIT)
    save_file(one.state_dict(), folder / "one.safetensors")
    torch.save({"state_dict": moved(one, 1), "epoch": 3}, folder / "moved.pt")
    torch.save(tower(moved(one, 2)), folder / "tower.pt")
    two = clip_model(folder, "toy-align", VIT, seed=1)
    save_file(two.state_dict(), folder / "two.safetensors")
    images(folder / "pictures", 12)
    (folder / "pictures/notes.txt").write_text("not an image")
    return folder


@pytest.fixture
def project(made, tmp_path):
    shutil.copytree(made, tmp_path / "work")
    config = {
        "model": "toy-align.json",
        "experts": {"one": "one.safetensors", "two": "two.safetensors"},
        "images": "pictures",
        "output": "out",
        "workers": 0,
    }
    return tmp_path / "work", config


def align(folder, config):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return CliRunner().invoke(app, ["align", str(path)])


def done(folder, config):
    result = align(folder, config)
    assert result.exit_code == 0, (result.output, result.exception)
    return result, json.loads((folder / "out/alignment.json").read_text())


def printed_code(result):
    """What is between the two sentences of the ending."""
    return result.stdout.split("to load the merge:")[1].split("to train a Portland")[0]


# -- whole runs -----------------------------------------------------------------------------------


def test_reordered_copies_are_put_back(project):
    folder, config = project
    config["experts"] = {"one": "one.safetensors", "copy": "moved.pt", "tower": "tower.pt"}
    _, report = done(folder, config)
    one = load_file(folder / "one.safetensors")
    copy = load_file(folder / "out/aligned_copy.safetensors")
    assert copy.keys() == one.keys()
    text = torch.load(folder / "moved.pt")["state_dict"]["text_projection"]
    assert torch.equal(copy["text_projection"], text)
    alone = load_file(folder / "out/aligned_tower.safetensors")
    assert alone.keys() == tower(one).keys()
    for name, tensor in tower(one).items():
        assert torch.equal(alone[name], tensor) and torch.equal(copy[f"visual.{name}"], tensor)
    merged = load_file(folder / "out/merged.safetensors")
    torch.testing.assert_close(merged, one)  # the reference's text tower too
    assert report["trace_before"] > 1 and report["trace_after"] == 0
    assert report["value"] == pytest.approx(1, abs=1e-3) and report["converged"]
    assert report["files"] == [
        "alignment.safetensors", "aligned_one.safetensors", "aligned_copy.safetensors",
        "aligned_tower.safetensors", "merged.safetensors",
    ]  # fmt: skip
    assert all((folder / "out" / name).is_file() for name in report["files"])
    assert report["settings"]["balance"] == 0.5 and report["images"] == 12


def test_half_precision_stays(project):
    folder, config = project
    config["experts"] = {"one": "one.safetensors", "copy": "copy.safetensors"}
    one = {k: v.half() for k, v in load_file(folder / "one.safetensors").items()}
    copy = torch.load(folder / "moved.pt")["state_dict"]
    save_file(one, folder / "one.safetensors")
    save_file({k: v.half() for k, v in copy.items()}, folder / "copy.safetensors")
    done(folder, config)
    for name in ("merged", "aligned_copy"):
        written = tower(load_file(folder / f"out/{name}.safetensors"))
        torch.testing.assert_close(written, tower(one), rtol=0, atol=0)


@pytest.mark.parametrize("balance", [0, 0.5, 1])
def test_unrelated_experts_keep_their_function_and_come_nearer(project, balance):
    folder, config = project
    _, report = done(folder, {**config, "balance": balance, "order": "seeded", "sweeps": 3})
    given, aligned = {}, {}
    for name in ("one", "two"):
        given[name] = load_file(folder / f"{name}.safetensors")
        aligned[name] = load_file(folder / f"out/aligned_{name}.safetensors")
        assert {k: v.dtype for k, v in given[name].items()} == {
            k: v.dtype for k, v in aligned[name].items()
        }
    model = open_clip.create_model("toy-align").double().eval()
    pixels = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    outputs = []
    for state in (given["two"], aligned["two"]):
        model.load_state_dict({k: v.double() for k, v in state.items()})
        outputs.append(model.encode_image(pixels))
    torch.testing.assert_close(*outputs)
    for states, found in ((given, "before"), (aligned, "after")):
        towers = [tower(states[name]) for name in ("one", "two")]
        apart = sum(float((towers[0][k].double() - towers[1][k]).square().sum()) for k in towers[0])
        assert report[f"squared_distances_{found}"][0][1] == pytest.approx(apart, rel=1e-4)
        assert report[f"trace_{found}"] == pytest.approx(apart / 2, rel=1e-4)
    assert (report["trace_after"] < report["trace_before"]) or balance == 0
    merged = load_file(folder / "out/merged.safetensors")
    for name in tower(merged):
        mean = (aligned["one"][f"visual.{name}"].double() + aligned["two"][f"visual.{name}"]) / 2
        torch.testing.assert_close(merged[f"visual.{name}"].double(), mean, rtol=1e-6, atol=1e-7)


def test_the_tables_show_what_the_report_holds(project):
    folder, config = project
    result, report = done(folder, config)
    alignment = Alignment.load(folder / "out/alignment.safetensors")
    assert alignment.names == ("one", "two") and alignment.values == report["values"]
    best = [v for v in report["values"] if sum(v.values()) / len(v) == report["value"]][-1]
    heads = [best[f"transformer.resblocks.{k}.attn.qk"] for k in (0, 1)]
    rows = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert ["conv1", "1", "32", f"{best['conv1']:.4f}"] in rows
    row = ["transformer.resblocks.*.attn.qk", "2", "64", f"{sum(heads) / 2:.4f}"]
    assert row in rows
    assert ["all", "7", "416", f"{report['value']:.4f}"] in rows
    distances = [report[f"squared_distances_{when}"][0][1] for when in ("before", "after")]
    assert ["two", *(f"{distance:.6g}" for distance in distances)] in rows
    traces = [report[f"trace_{when}"] for when in ("before", "after")]
    assert ["tr", "G", "of", "all", *(f"{trace:.6g}" for trace in traces)] in rows
    for word in ("images: 12", "activations", "matching, mean similarity"):
        assert word in result.stderr


def test_the_balance_is_chosen_whose_merge_is_most_like_the_ensemble(project):
    folder, config = project
    result, report = done(folder, {**config, "balances": [0.2, 0.5, 1], "sweeps": 3})
    likeness = {float(balance): value for balance, value in report["likeness"].items()}
    assert list(likeness) == [0.2, 0.5, 1]
    assert likeness[report["balance"]] == max(likeness.values())
    model, _, transform = open_clip.create_model_and_transforms("toy-align")
    pixels = batch_of(sorted((folder / "pictures").rglob("*.png")), transform)
    outputs = {}
    for name in ("one.safetensors", "two.safetensors", "out/merged.safetensors"):
        model.load_state_dict(load_file(folder / name))
        outputs[name] = model.eval().encode_image(pixels, normalize=True).detach().double().numpy()
    merged = outputs.pop("out/merged.safetensors")
    mean = sum(outputs.values())
    cosines = (merged * mean).sum(1) / np.linalg.norm(mean, axis=1)
    assert max(likeness.values()) == pytest.approx(cosines.mean(), abs=1e-5)
    chosen = next(line for line in result.stdout.splitlines() if "chosen" in line)
    assert chosen.split() == [f"{report['balance']:g}", f"{cosines.mean():.4f}", "chosen"]


def test_the_printed_code_loads_the_merge(project):
    folder, config = project
    result, _ = done(folder, config)
    scope = {}
    exec(printed_code(result), scope)
    merged = load_file(folder / "out/merged.safetensors")
    torch.testing.assert_close(scope["model"].state_dict(), merged, rtol=0, atol=0)
    files = yaml.safe_load(result.stdout.split("`neulig-fast train`:")[1])
    assert files["model"] == str(folder / "toy-align.json")
    assert {name: Path(path).is_file() for name, path in files["experts"].items()} == {
        "one": True,
        "two": True,
    }


def test_the_printed_code_loads_an_image_tower_alone(project):
    folder, config = project
    config["experts"] = {"tower": "tower.pt", "one": "one.safetensors"}
    result, _ = done(folder, config)
    merged = load_file(folder / "out/merged.safetensors")
    assert merged.keys() == torch.load(folder / "tower.pt").keys()
    scope = {}
    exec(printed_code(result), scope)
    torch.testing.assert_close(scope["model"].visual.state_dict(), merged, rtol=0, atol=0)


def test_weights_alone_need_no_images(project):
    folder, config = project
    del config["images"]
    _, report = done(folder, {**config, "balance": 1, "similarity": "inner_product"})
    assert report["images"] == 0 and report["trace_after"] < report["trace_before"]


def test_a_zip_writes_the_merge_alone(project):
    folder, config = project
    config["experts"] = {"one": "one.safetensors", "copy": "moved.pt"}
    result, report = done(folder, {**config, "match": "zip", "balance": 1})
    assert report["files"] == ["alignment.safetensors", "merged.safetensors"]
    assert report["trace_after"] is None and "train a Portland" not in result.stdout
    alignment = Alignment.load(folder / "out/alignment.safetensors")
    states = load_file(folder / "one.safetensors"), torch.load(folder / "moved.pt")["state_dict"]
    expected = alignment.merge(map(tower, states))
    merged = load_file(folder / "out/merged.safetensors")
    torch.testing.assert_close(tower(merged), expected, rtol=0, atol=0)


def test_a_timm_model_in_another_order_is_put_back(project):
    folder, config = project
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=7).eval()
    copy, _ = random_permutation(model, spec_for(model), seed=1)
    for name, module in (("one", model), ("two", copy)):
        save_file(module.state_dict(), folder / f"{name}.safetensors")
    result, _ = done(folder, {**config, "model": "timm/test_vit", "max_images": 4})
    aligned = load_file(folder / "out/aligned_two.safetensors")
    assert all(torch.equal(aligned[k], v) for k, v in model.state_dict().items())
    scope = {}
    exec(result.stdout.split("to load the merge:")[1], scope)
    pixels = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(scope["model"].eval()(pixels), model(pixels))


def test_a_sample_of_the_images_is_run_by_seed(project, monkeypatch):
    folder, config = project
    seen, original = [], ActivationMoments.collect

    def watching(self, data, *rest):
        seen.append(data.dataset.folder.files)
        return original(self, data, *rest)

    monkeypatch.setattr(ActivationMoments, "collect", watching)
    for seed in (0, 0, 1):
        _, report = done(folder, {**config, "max_images": 5, "seed": seed, "batch_size": 2})
        assert report["images"] == len(seen[-1]) == len(set(seen[-1])) == 5
    assert seen[0] == seen[1] != seen[2]


# -- repair ---------------------------------------------------------------------------------------


def use_resnet(folder, config):
    """Experts with BatchNorm."""
    for seed, name in enumerate(("one", "two")):
        model = clip_model(folder, "toy-align-resnet", RESNET, seed)
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    config["model"] = "toy-align-resnet.json"


def test_batchnorm_is_measured_on_the_images(project):
    folder, config = project
    use_resnet(folder, config)
    config.update(balance=1, sweeps=1)
    done(folder, config)
    plain = load_file(folder / "out/merged.safetensors")
    done(folder, {**config, "repair": "batchnorm"})
    merged = load_file(folder / "out/merged.safetensors")
    differing = {k for k in plain if not torch.equal(plain[k], merged[k])}
    assert differing == {
        k
        for k in plain
        if k.split(".")[-1] in ("running_mean", "running_var", "num_batches_tracked")
    }
    preprocess = open_clip.create_model_and_transforms("toy-align-resnet")[2]
    pixels = batch_of(sorted((folder / "pictures").rglob("*.png")), preprocess).double()
    weight = merged["visual.conv1.weight"].double()
    output = torch.nn.functional.conv2d(pixels, weight, stride=2, padding=1)
    for name, expected in (
        ("running_mean", output.mean((0, 2, 3))),
        ("running_var", output.transpose(0, 1).flatten(1).var(1)),
    ):
        torch.testing.assert_close(
            merged[f"visual.bn1.{name}"].double(), expected, rtol=1e-4, atol=1e-6
        )


def test_rescale_gives_the_merge_the_experts_moments(project):
    folder, config = project
    done(folder, {**config, "repair": "rescale"})
    preprocess = open_clip.create_model_and_transforms("toy-align")[2]
    pixels = batch_of(sorted((folder / "pictures").rglob("*.png")), preprocess).double()
    model = open_clip.create_model("toy-align").double().eval()
    hidden = []
    layer = model.visual.transformer.resblocks[1].mlp.c_fc
    layer.register_forward_hook(lambda *args: hidden.append(args[2].flatten(0, 1)))
    for name in ("aligned_one", "aligned_two", "merged"):
        state = load_file(folder / f"out/{name}.safetensors")
        model.load_state_dict({k: v.double() for k, v in state.items()})
        model.encode_image(pixels)
    for moment in (torch.mean, torch.std):
        one, two, merged = (moment(x, 0) for x in hidden)
        torch.testing.assert_close(merged, (one + two) / 2, rtol=1e-3, atol=1e-4)


# -- interrupted ----------------------------------------------------------------------------------


def test_ctrl_c_while_matching_keeps_the_best(project, monkeypatch):
    folder, config = project
    calls, original = [], WeightSimilarity.similarity

    def interrupted(self, node):
        calls.append(node)
        if len(calls) == 8:  # of 7 nodes: in the second sweep
            raise KeyboardInterrupt
        return original(self, node)

    monkeypatch.setattr(WeightSimilarity, "similarity", interrupted)
    result = align(folder, config)
    assert result.exit_code == 130
    assert "interrupted: the best matching so far is kept and written" in result.stderr
    report = json.loads((folder / "out/alignment.json").read_text())
    assert report["interrupted"] and not report["converged"]
    assert len(report["values"]) == 2  # activations, and one sweep
    assert report["trace_after"] < report["trace_before"]
    assert all((folder / "out" / name).is_file() for name in report["files"])


def test_ctrl_c_before_anything_is_matched_writes_nothing(project, monkeypatch):
    folder, config = project

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ActivationMoments, "collect", interrupted)
    result = align(folder, config)
    assert (result.exit_code, result.stdout) == (130, "")
    assert "interrupted; no file is half written: repeat the command" in result.stderr
    assert not list((folder / "out").iterdir())


def test_a_full_disk_leaves_no_half_file(project, monkeypatch):
    folder, config = project

    def full(_):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(os, "fsync", full)
    result = align(folder, config)
    assert result.exit_code == 2 and "No space left" in result.stderr
    assert not list((folder / "out").iterdir())


# -- bad input ------------------------------------------------------------------------------------


@pytest.fixture
def valid(tmp_path):
    for name in ("a.pt", "b.safetensors", "merged.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "data").mkdir()
    return {
        "model": "ViT-B-32",
        "experts": {"a": "a.pt", "b": "b.safetensors"},
        "images": "data",
        "output": "out",
    }


def load(folder, content):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_config(path)


def test_paths_are_relative_to_the_file(valid, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    config = load(tmp_path, valid)
    assert config.experts == {"a": tmp_path / "a.pt", "b": tmp_path / "b.safetensors"}
    assert (config.images, config.output) == (tmp_path / "data", tmp_path / "out")


def test_defaults_are_those_of_align():
    import inspect

    from neulig_fast import align

    for name, argument in inspect.signature(align).parameters.items():
        if name in AlignConfig.model_fields and name != "experts":
            assert AlignConfig.model_fields[name].default == argument.default, name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"blance": 1}, "blance: unknown key; did you mean 'balance'?"),
        ({"tasks": {}}, "tasks: unknown key (known: model, experts, output, balance,"),
        ({"model": "none.json"}, "model: "),
        ({"experts": {"a": "a.pt"}}, "experts: needs two or more, got 1"),
        ({"experts": {"a": "a.pt", "b": "none.pt"}}, "experts.b: "),
        ({"experts": {"a": "a.pt", "b/c": "a.pt"}}, "experts.b/c: names are of letters"),
        ({"experts": ["a.pt", "b.safetensors"]}, "experts: input should be a valid dictionary"),
        ({"output": "a.pt"}, "a.pt is a file, not a folder"),
        ({"balance": 1.5}, "balance: input should be less than or equal to 1, got 1.5"),
        ({"balance": float("nan")}, "balance: input should be"),
        ({"balance": [0.1, 0.5]}, "balance: input should be a valid number, got [0.1, 0.5]"),
        ({"balances": []}, "balances: list should have at least 1 item"),
        ({"balances": [0.5, 2]}, "balances.1: input should be less than or equal to 1, got 2"),
        ({"balance": 0.2, "balances": [0.5]}, "balances: is a grid to choose from: leave balance"),
        ({"balances": [1], "images": None}, "images: is missing: balances are compared by"),
        ({"balances": [1, 0.5], "similarity": "inner_product"}, "similarity: inner_product cannot"),
        ({"balance": True}, "balance: takes no true or false"),
        ({"match": "zipp"}, "match: must be one of align, zip, got 'zipp'; did you mean 'zip'?"),
        ({"similarity": "cosine"}, "similarity: must be one of correlation, inner_product"),
        ({"similarity": "inner_product"}, "similarity: inner_product cannot be mixed"),
        ({"order": "color"}, "order: must be one of colour, seeded, got 'color'; did you mean"),
        ({"order": 3}, "order: must be one of colour, seeded, got 3"),
        ({"seed": -1}, "seed: input should be greater than or equal to 0"),
        ({"sweeps": 0}, "sweeps: input should be greater than or equal to 1"),
        ({"repair": "batch_norm"}, "repair: must be one of none, batchnorm, rescale, got"),
        ({"repair": "rescale", "match": "zip"}, "repair: rescale repairs merges of aligned"),
        ({"images": None}, "images: is missing: balance 0.5 compares activations"),
        ({"images": None, "balance": 1, "repair": "rescale"}, "images: is missing: repair:"),
        ({"images": "a.pt"}, "a.pt is a file, not a folder"),
        ({"max_images": 0}, "max_images: input should be greater"),
        ({"device": "gpu"}, "device: must be auto, cpu"),
    ],
)
def test_a_fault_is_named_with_its_place(valid, tmp_path, change, message):
    with pytest.raises(ValueError) as error:
        load(tmp_path, {**valid, **change})
    assert message in str(error.value)


def test_inputs_are_never_written_over(valid, tmp_path):
    valid["experts"]["m"] = "merged.safetensors"
    load(tmp_path, valid)
    with pytest.raises(ValueError, match=r"output: .* holds the files of experts\.m under names"):
        load(tmp_path, {**valid, "output": "."})


def test_inputs_behind_links_and_model_configs_are_never_written_over(valid, tmp_path):
    valid["experts"]["m"] = "a.pt"
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/aligned_m.safetensors").symlink_to(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"holds the files of experts\.a, experts\.m under names"):
        load(tmp_path, {**valid, "output": "linked"})
    (tmp_path / "old").mkdir()
    (tmp_path / "old/alignment.json").write_text(json.dumps(VIT))
    with pytest.raises(ValueError, match=r"output: .* holds the files of model under names"):
        load(tmp_path, {**valid, "model": "old/alignment.json", "output": "old"})


def test_all_faults_come_in_one_error(valid, tmp_path):
    del valid["images"], valid["model"]
    with pytest.raises(ValueError, match=r"config\.yaml: 4 problems") as error:
        load(tmp_path, {**valid, "mach": "zip", "sweeps": "many"})
    for place in ("model: is missing", "mach: unknown key", "sweeps: ", "images: is missing"):
        assert f"\n  - {place}" in str(error.value)


def unknown_model(folder, config):
    config["model"] = "ViT-B-23"
    return "model: open_clip has no model 'ViT-B-23'"


def unknown_timm_model(folder, config):
    config["model"] = "timm/test_vitt"
    return "model: timm has no model 'test_vitt'; did you mean 'test_vit"


def unknown_timm_tag(folder, config):
    config["model"] = "timm/test_vit.none"
    return "model: timm cannot build test_vit.none: "


def foreign_to_timm(folder, config):
    config["model"] = "timm/test_vit"
    return "one.safetensors is no state dict of this model (cls_token, "


def no_images(folder, config):
    (folder / "empty").mkdir()
    config["images"] = "empty"
    return "empty: no images (.bmp, "


def no_image_at_all(folder, config):
    (folder / "pictures/x/0.png").write_bytes(b"no image at all")
    return "x/0.png is not a readable image"


def truncated_checkpoint(folder, config):
    data = (folder / "one.safetensors").read_bytes()
    (folder / "one.safetensors").write_bytes(data[: len(data) // 2])
    return "experts.one: " + str(folder / "one.safetensors") + ": not a complete safetensors file"


def foreign_checkpoint(folder, config):
    save_file({"encoder.weight": torch.ones(3)}, folder / "two.safetensors")
    return "experts.two: " + str(folder / "two.safetensors") + " is neither a CLIP state dict"


def expert_of_other_shape(folder, config):
    state = torch.load(folder / "tower.pt")
    state["proj"] = state["proj"][:, :3].clone()
    torch.save(state, folder / "tower.pt")
    config["experts"]["tower"] = "tower.pt"
    return "'tower'): proj has shape (32, 3)"


def expert_with_nan(folder, config):
    state = load_file(folder / "two.safetensors")
    state["visual.class_embedding"][0] = torch.nan
    save_file(state, folder / "two.safetensors")
    return "class_embedding has 1 NaN"


def nothing_to_re_estimate(folder, config):
    config["repair"] = "batchnorm"
    return "has no BatchNorm; rescale or none fit it"


def nothing_to_rescale(folder, config):
    model = timm.create_model("test_resnet", num_classes=2)
    for name in ("one", "two"):
        save_file(model.state_dict(), folder / f"{name}.safetensors")
    config.update(model="timm/test_resnet", repair="rescale")
    return "repair: rescale needs layers with biases; timm/test_resnet has none"


BREAKAGES = [
    unknown_model,
    unknown_timm_model,
    unknown_timm_tag,
    foreign_to_timm,
    no_images,
    no_image_at_all,
    truncated_checkpoint,
    foreign_checkpoint,
    expert_of_other_shape,
    expert_with_nan,
    nothing_to_re_estimate,
    nothing_to_rescale,
]


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda f: f.__name__)
def test_bad_input_gets_one_message_and_leaves_nothing(project, breakage):
    folder, config = project
    message = breakage(folder, config)
    result = align(folder, config)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.count("error: ") == 1 and message in result.stderr, result.stderr
    assert not result.stdout
    assert not (folder / "out").exists()


@pytest.mark.parametrize("breakage", [no_images, no_image_at_all], ids=lambda f: f.__name__)
def test_faults_of_model_and_images_come_together(project, breakage):
    folder, config = project
    messages = [f(folder, config) for f in (unknown_model, breakage)]
    result = align(folder, config)
    assert all(message in result.stderr for message in messages), result.stderr


def test_faults_of_several_checkpoints_come_together(project):
    folder, config = project
    message = truncated_checkpoint(folder, config)
    (folder / "two.safetensors").write_bytes(b"")
    result = align(folder, config)
    assert message in result.stderr and "two.safetensors: the file is empty" in result.stderr


# -- documentation --------------------------------------------------------------------------------


def test_every_key_is_documented():
    text = (ROOT / "docs/align.md").read_text().partition("## From the command line")[2]
    assert not [key for key in AlignConfig.model_fields if f"| `{key}` |" not in text]


def test_the_example_is_valid_but_for_its_paths(tmp_path):
    text = (ROOT / "examples/align.yaml").read_text()
    content = yaml.safe_load(text)
    for path in content["experts"].values():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    (tmp_path / content["images"]).mkdir(parents=True)
    (tmp_path / "align.yaml").write_text(text)
    assert len(load_config(tmp_path / "align.yaml").experts) >= 2
