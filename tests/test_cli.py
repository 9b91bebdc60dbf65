"""The program: its commands, a whole ``train`` run on toy experts, and how it ends when it must."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from neulig_fast.cli import app
from neulig_fast.neulig import NeuLig, evaluate, features
from neulig_fast.outputs import loading_code, with_visual

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
}
COLOURS = {"dark_red": (160, 20, 20), "green": (30, 200, 40), "blue": (20, 40, 220)}
SHADES = {"0": (40, 40, 40), "1": (220, 220, 220)}


# -- experts and images ---------------------------------------------------------------------------


def clip_model(folder, name="toy-clip"):
    """A model with 20 000 parameters in its image tower; its config is ``folder/<name>.json``."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    return open_clip.create_model(name).eval()


def expert(model, seed):
    """A whole CLIP state dict whose image tower moved away from the model's."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value + 0.05 * torch.randn(value.shape, generator=generator)
        if key.startswith("visual.")
        else value.clone()
        for key, value in model.state_dict().items()
    }


def tower(state):
    return {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}


def images(root, count, seed, classes):
    """``count`` noisy PNGs of 20 x 18 pixels per class below ``root``."""
    rng = np.random.default_rng(seed)
    for name, colour in classes.items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            pixels = np.clip(np.array(colour) + rng.normal(0, 40, (18, 20, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{k}.png")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are tiny; and the same bits as in the processes started here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with everything a run needs, and its configuration."""
    folder = tmp_path_factory.mktemp("made")
    model = clip_model(folder)
    save_file(model.state_dict(), folder / "base.safetensors")
    save_file(expert(model, 1), folder / "colours.safetensors")
    torch.save({"state_dict": expert(model, 2), "epoch": 3}, folder / "shades.pt")
    torch.save(tower(expert(model, 3)), folder / "tower.pt")
    images(folder / "colours/train", 4, 0, COLOURS)
    images(folder / "colours/test", 3, 1, COLOURS)
    images(folder / "shades/train", 5, 2, SHADES)
    images(folder / "shades/val", 2, 3, SHADES)
    images(folder / "shades/test", 2, 4, SHADES)
    (folder / "colours/train/green/notes.txt").write_text("not an image")
    config = {
        "model": "toy-clip.json",
        "pretrained": "base.safetensors",
        "experts": {
            "colours": "colours.safetensors",
            "shades": "shades.pt",
            "tower": "tower.pt",
        },
        "tasks": {
            "colours": {"train": "colours/train", "test": "colours/test"},
            "shades": {
                "train": "shades/train",
                "val": "shades/val",
                "test": "shades/test",
                "class_names": {0: "dark", 1: "light"},
                "templates": ["a {} image.", "something {}."],
            },
        },
        "output": "out",
        "fit": {"epochs": 12, "batch_size": 8, "lr": 1e-2},
        "workers": 0,
        "batch_size": 8,
    }
    return folder, config


@pytest.fixture
def project(made, tmp_path):
    """A copy of ``made`` for one test."""
    shutil.copytree(made[0], tmp_path / "work")
    config = json.loads(json.dumps(made[1]))
    return tmp_path / "work", {**config, "evaluate": {"modes": ["dataset"]}}


def train(folder, config):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return CliRunner().invoke(app, ["train", str(path)])


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory):
    """A finished run: its folder, its configuration, what the program printed."""
    folder = tmp_path_factory.mktemp("finished") / "work"
    shutil.copytree(made[0], folder)
    result = train(folder, made[1])
    assert result.exit_code == 0, result.output
    return folder, made[1], result


def merged(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.glob("out/merged_*.safetensors"))}


def program(*arguments):
    """``python -m neulig_fast`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "neulig_fast", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


# -- a whole run ----------------------------------------------------------------------------------


def test_train_writes_everything(finished):
    folder, config, result = finished
    out = folder / "out"
    for name in ("report.json", "report.txt", "accuracy.png", "losses.png", "engine/neulig.json"):
        assert (out / name).stat().st_size > 0, name
    assert json.loads((out / "toy-clip.json").read_text()) == CONFIG
    report = json.loads((out / "report.json").read_text())
    assert report["tasks"] == ["colours", "shades"]
    rows = {"pretrained", "expert", "uniform", "task_arithmetic", "hard", "ensemble", "global"}
    assert rows < set(report["accuracy"])
    assert report["settings"]["class_names"]["colours"] == ["blue", "dark red", "green"]
    assert report["settings"]["class_names"]["shades"] == ["dark", "light"]
    assert report["settings"]["own"] == {"colours": "colours", "shades": "shades"}
    assert report["settings"]["config"]["fit"]["epochs"] == config["fit"]["epochs"]
    assert "own expert" in result.stdout and "merged_colours.safetensors" in result.stdout
    assert "task colours: 11 + 1 + 9 images" in result.stderr
    assert "1 other files ignored" in result.stderr
    assert "task shades: 10 + 4 + 4 images" in result.stderr


def test_the_printed_code_loads_a_merged_model(finished):
    folder, _, result = finished
    code = result.stdout[result.stdout.index("import open_clip") :]
    scope = {}
    exec(code, scope)
    saved = load_file(folder / "out/merged_colours.safetensors")
    assert saved.keys() == scope["model"].state_dict().keys()
    image = Image.open(folder / "colours/test/green/0.png")
    assert scope["preprocess"](image).shape == (3, 16, 16)


def test_merged_files_are_the_dataset_merges(finished):
    folder, _, _ = finished
    model, _, preprocess = open_clip.create_model_and_transforms(
        "toy-clip", pretrained=str(folder / "out/merged_shades.safetensors")
    )
    model.eval()
    engine = NeuLig.load(folder / "out/engine", template=clip_model(folder).visual)
    files = sorted((folder / "shades/test").glob("*/*.png"))
    batch = torch.stack([preprocess(Image.open(path)) for path in files])
    expected = engine.merged_forward(batch, "shades", mode="dataset")
    with torch.no_grad():
        assert torch.equal(engine.heads["shades"](model.encode_image(batch)), expected)
    base = load_file(folder / "base.safetensors")
    for name, tensor in model.state_dict().items():
        assert name.startswith("visual.") or torch.equal(tensor, base[name])


def test_pretrained_may_be_left_out_when_text_towers_are_equal(project):
    folder, config = project
    del config["pretrained"], config["experts"]["tower"]
    result = train(folder, config)
    assert result.exit_code == 0, result.output
    rows = json.loads((folder / "out/report.json").read_text())["accuracy"]
    assert set(rows) == {"expert", "uniform", "hard", "ensemble", "dataset"}
    base = load_file(folder / "base.safetensors")
    saved = load_file(folder / "out/merged_colours.safetensors")
    assert torch.equal(saved["text_projection"], base["text_projection"])


def test_views_are_augmented_alike_whatever_the_workers(project):
    folder, config = project
    config["fit"].update(views=3, starts=2, patience=2)
    results = []
    for workers in (0, 1):
        shutil.rmtree(folder / "out", ignore_errors=True)
        result = train(folder, {**config, "workers": workers})
        assert result.exit_code == 0, result.output
        results.append(merged(folder))
    assert results[0] == results[1]


def test_preprocessing_of_ones_own_reaches_the_loading_code(project):
    folder, config = project
    config["preprocess"] = {"mean": [0.5, 0.5, 0.5], "interpolation": "bilinear"}
    result = train(folder, config)
    assert result.exit_code == 0, result.output
    scope = {}
    exec(result.stdout[result.stdout.index("import open_clip") :], scope)
    assert list(scope["preprocess"].transforms[-1].mean) == [0.5, 0.5, 0.5]
    assert scope["preprocess"].transforms[0].interpolation.value == "bilinear"


def use_resnet(folder, config):
    """A single expert with BatchNorm instead."""
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8}
    path = folder / "toy-resnet.json"
    path.write_text(json.dumps({**CONFIG, "vision_cfg": vision}))
    open_clip.add_model_config(path)
    save_file(open_clip.create_model("toy-resnet").state_dict(), folder / "resnet.safetensors")
    del config["pretrained"]
    config.update(model="toy-resnet.json", experts={"a": "resnet.safetensors"})


def test_the_batchnorm_policy_reaches_the_files(project):
    folder, config = project
    use_resnet(folder, config)
    config["evaluate"]["batchnorm"] = "re_estimate"
    result = train(folder, config)
    assert result.exit_code == 0, result.output
    expert = load_file(folder / "resnet.safetensors")
    saved = [load_file(path) for path in sorted((folder / "out").glob("merged_*.safetensors"))]
    for state in saved:  # a merge of one expert is the expert, but for the statistics
        differing = {k for k in expert if not torch.equal(expert[k], state[k])}
        assert differing and all(k.split(".")[-1].startswith(("running", "num")) for k in differing)
    name = "visual.bn1.running_mean"
    assert not torch.equal(saved[0][name], saved[1][name])
    settings = json.loads((folder / "out/report.json").read_text())["settings"]
    assert (settings["batchnorm"], settings["own"]) == ("re_estimate", None)


# -- interrupted ----------------------------------------------------------------------------------


def test_ctrl_c_says_how_to_resume(project, finished, monkeypatch):
    folder, config = project

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "evaluate", interrupted)
        result = train(folder, config)
    assert result.exit_code == 130
    assert "interrupted; what is done is kept: repeat the command" in result.stderr
    assert not merged(folder)
    assert train(folder, config).exit_code == 0
    assert merged(folder) == merged(finished[0])


def test_a_killed_run_resumes_by_python_m_with_the_same_bits(python, project, finished):
    folder, config = project
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    killed = python(
        "import os, torch\n"
        "torch.set_num_threads(1)\n"
        "from neulig_fast.neulig.checkpoint import Checkpoint\n"
        "write = Checkpoint.write\n"
        "Checkpoint.write = lambda *args: (write(*args), os._exit(9))\n"
        "from neulig_fast.cli import app\n"
        "app()",
        "train",
        path,
    )
    assert killed.returncode == 9, killed.stderr
    assert list(folder.glob("out/cache/fit-*.safetensors")) and not merged(folder)
    resumed = program("train", str(path))
    assert resumed.returncode == 0, resumed.stderr
    assert "import open_clip" in resumed.stdout
    assert merged(folder) == merged(finished[0])


def test_a_repeated_run_encodes_nothing(project, finished, monkeypatch):
    folder, config = project
    shutil.copytree(finished[0] / "out", folder / "out")
    seen, original = [], features.expert_forward

    def counting(pool, images, **options):
        seen.append(len(images))
        return original(pool, images, **options)

    monkeypatch.setattr(features, "expert_forward", counting)
    result = train(folder, config)
    assert result.exit_code == 0, (result.output, result.exception)
    files = len(list(folder.glob("out/cache/*/*.safetensors")))
    assert 0 < sum(seen) <= files  # one image of every file, to prove the files


def test_other_settings_in_the_same_folder_start_anew(project, finished):
    folder, config = project
    shutil.copytree(finished[0] / "out", folder / "out")
    config["fit"]["epochs"] = 2
    result = train(folder, config)
    assert result.exit_code == 0, result.output
    assert len(list(folder.glob("out/cache/fit-*.safetensors"))) == 2


def test_other_images_in_the_same_folder_start_anew(project):
    folder, config = project
    assert train(folder, config).exit_code == 0
    shutil.copy(folder / "colours/test/green/0.png", folder / "colours/train/green/new.png")
    result = train(folder, config)
    assert result.exit_code == 0, result.output
    assert len(list(folder.glob("out/cache/fit-*.safetensors"))) == 2


def test_a_damaged_engine_in_the_output_is_replaced(project, finished):
    folder, config = project
    shutil.copytree(finished[0] / "out", folder / "out")
    (folder / "out/engine/neulig.json").write_text("{")
    result = train(folder, config)
    assert result.exit_code == 0, result.output
    assert NeuLig.load(folder / "out/engine").history is not None


def test_an_engine_that_cannot_be_saved_leaves_the_report(project, finished, monkeypatch):
    folder, config = project
    shutil.copytree(finished[0] / "out/cache", folder / "out/cache")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(NeuLig, "save", full)
    result = train(folder, config)
    assert result.exit_code == 2 and "No space left" in result.stderr
    for name in ("report.json", "report.txt", "accuracy.png"):
        assert (folder / "out" / name).stat().st_size > 0


# -- bad input ------------------------------------------------------------------------------------


def unknown_key(folder, config):
    config["fit"]["epohcs"] = 3
    return "fit.epohcs: unknown key; did you mean 'epochs'?"


def unknown_model(folder, config):
    config["model"] = "ViT-B-23"
    return "open_clip has no model 'ViT-B-23'"


def unknown_tag(folder, config):
    config.update(model="ViT-B-32", pretrained="opeani")
    return "pretrained: 'opeani' is neither a file nor a tag"


def config_without_towers(folder, config):
    (folder / "toy-clip.json").write_text('{"embed_dim": 3}')
    return "is no open_clip config: it lacks vision_cfg, text_cfg"


def config_that_builds_nothing(folder, config):
    broken = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "layres": 3}}
    (folder / "toy-broken.json").write_text(json.dumps(broken))
    config["model"] = "toy-broken.json"
    return "open_clip cannot build"


def small_vocabulary(folder, config):
    small = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "vocab_size": 100}}
    (folder / "toy-small.json").write_text(json.dumps(small))
    config["model"] = "toy-small.json"
    return "text_cfg.vocab_size is 100"


def unknown_expert(folder, config):
    config["tasks"]["colours"]["expert"] = "colour"
    return "tasks.colours.expert: there is no expert 'colour'; did you mean 'colours'?"


def pickle_with_code(folder, config):
    torch.save({"weight": Attack()}, folder / "shades.pt")
    return "shades.pt: loading this pickle needs to run posix.system, which is refused"


class Attack:
    def __reduce__(self):
        return (os.system, ("touch hacked",))


def truncated_checkpoint(folder, config):
    data = (folder / "colours.safetensors").read_bytes()
    (folder / "colours.safetensors").write_bytes(data[: len(data) // 2])
    return "colours.safetensors: not a complete safetensors file"


def foreign_checkpoint(folder, config):
    save_file({"encoder.weight": torch.ones(3)}, folder / "colours.safetensors")
    return "colours.safetensors is neither a CLIP state dict (names such as visual."


def expert_of_other_shape(folder, config):
    state = torch.load(folder / "tower.pt")
    state["proj"] = state["proj"][:, :3].clone()
    torch.save(state, folder / "tower.pt")
    return "'tower'): proj has shape (32, 3)"


def expert_with_nan(folder, config):
    state = torch.load(folder / "tower.pt")
    state["class_embedding"][0] = torch.nan
    torch.save(state, folder / "tower.pt")
    return "class_embedding has 1 NaN"


def pretrained_without_text(folder, config):
    config["pretrained"] = "tower.pt"
    return "tower.pt: is no CLIP state dict"


def pretrained_lacks_a_tensor(folder, config):
    state = load_file(folder / "base.safetensors")
    del state["ln_final.bias"]
    save_file(state, folder / "base.safetensors")
    return "base.safetensors: lacks ln_final.bias"


def no_text_tower(folder, config):
    del config["pretrained"]
    return "pretrained: is needed for the class names' embeddings: expert 'tower' is an image tower"


def different_text_towers(folder, config):
    del config["pretrained"], config["experts"]["tower"]
    state = load_file(folder / "colours.safetensors")
    state["text_projection"] += 1
    save_file(state, folder / "colours.safetensors")
    return "the text towers of 'colours' and 'shades' differ (text_projection"


def different_classes(folder, config):
    (folder / "colours/test/green").rename(folder / "colours/test/gren")
    return "lacks green; has gren besides"


def empty_class(folder, config):
    for path in (folder / "shades/train/1").iterdir():
        path.unlink()
    return "tasks.shades.train: " + str(folder / "shades/train") + ": class folders without images"


def no_classes(folder, config):
    config["tasks"]["colours"]["test"] = "colours/test/green"
    return "green has no sub-folders; expected one per class"


def unreadable_image(folder, config):
    (folder / "colours/test/blue/1.png").write_bytes(b"no image at all")
    return "blue/1.png is not a readable image"


def unknown_class_name(folder, config):
    config["tasks"]["colours"]["class_names"] = {"dark_red": "maroon", "gren": "green"}
    return "tasks.colours.class_names: no such class folder: 'gren'; did you mean 'green'?"


def impossible_policy(folder, config):
    use_resnet(folder, config)
    config["evaluate"] = {"modes": ["per_sample"], "batchnorm": "re_estimate"}
    return "evaluate: batchnorm='re_estimate' is impossible per sample"


BREAKAGES = [
    unknown_key,
    unknown_model,
    unknown_tag,
    config_without_towers,
    config_that_builds_nothing,
    small_vocabulary,
    unknown_expert,
    pickle_with_code,
    truncated_checkpoint,
    foreign_checkpoint,
    expert_of_other_shape,
    expert_with_nan,
    pretrained_without_text,
    pretrained_lacks_a_tensor,
    no_text_tower,
    different_text_towers,
    different_classes,
    empty_class,
    no_classes,
    unreadable_image,
    unknown_class_name,
    impossible_policy,
]


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda f: f.__name__)
def test_bad_input_gets_one_message_and_leaves_nothing(project, breakage, monkeypatch):
    folder, config = project
    monkeypatch.chdir(folder)
    message = breakage(folder, config)
    result = train(folder, config)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.count("error: ") == 1 and message in result.stderr, result.stderr
    assert not result.stdout
    assert not (folder / "out").exists()
    assert not (folder / "hacked").exists()


def test_faults_of_several_folders_come_together(project):
    folder, config = project
    messages = [f(folder, config) for f in (unknown_expert, different_classes, empty_class)]
    result = train(folder, config)
    assert all(message in result.stderr for message in messages), result.stderr


def test_faults_of_folders_and_checkpoints_come_together_under_the_files_name(project):
    folder, config = project
    breakages = (different_classes, pickle_with_code, truncated_checkpoint, unknown_tag)
    messages = [f(folder, config) for f in breakages]
    result = train(folder, config)
    assert all(message in result.stderr for message in messages), result.stderr
    assert result.stderr.startswith(f"error: {folder}/") and "yaml: 4 problems\n" in result.stderr
    assert "\n  - experts.shades: " in result.stderr


def test_a_wrong_model_is_told_in_a_few_lines(project):
    """Hundreds of tensors that are missing are one problem: some by name, and how many there are"""
    folder, config = project
    state = load_file(folder / "base.safetensors")
    kept = {name: t for name, t in state.items() if "resblocks" not in name}
    save_file({**kept, "a": torch.ones(1), "b": torch.ones(1)}, folder / "base.safetensors")
    result = train(folder, config)
    _, lacks, has = result.stderr.splitlines()[-3:]
    gone = [name for name in state if name not in kept]
    assert lacks.startswith("  - lacks ") and lacks.endswith(f" and {len(gone) - 3} more")
    named = lacks.removeprefix("  - lacks ").split(" and ")[0].split(", ")
    assert len(named) == 3 and set(named) <= set(gone)
    assert has == "  - has a, b, which the model lacks"


def test_an_output_that_cannot_be_written_is_found_before_encoding(project, monkeypatch):
    folder, config = project

    def refused(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    monkeypatch.setattr(features, "expert_forward", None)  # cannot be called
    result = train(folder, config)
    assert result.exit_code == 2
    assert f"error: cannot write to {folder}/out/cache: Permission denied" in result.stderr


def test_a_truncated_image_is_named_while_encoding(project):
    folder, config = project
    path = folder / "colours/test/blue/1.png"
    path.write_bytes(path.read_bytes()[:300])  # the header is fine
    result = train(folder, {**config, "workers": 1})
    assert result.exit_code == 2
    assert "blue/1.png is not a readable image" in result.stderr
    assert "Traceback" not in result.stderr


def test_errors_have_no_traceback(project):
    folder, _ = project
    result = CliRunner().invoke(app, ["train", str(folder / "none.yaml")])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: {folder / 'none.yaml'}: No such file or directory\n"


# -- the other commands ---------------------------------------------------------------------------


def test_info_shows_every_op():
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0 and "blend" in result.output and "offset_gram" in result.output


def test_help_names_the_commands():
    result = CliRunner().invoke(app, ["--help"])
    for command in ("align", "demo", "info", "train"):
        assert command in result.output
    assert CliRunner().invoke(app, ["--version"]).output.startswith("neulig-fast ")


def test_help_and_info_import_little(python):
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from neulig_fast.cli import app\n"
        "helps = [[command, '--help'] for command in ('align', 'demo', 'train')]\n"
        "for arguments in (['--help'], ['info'], *helps):\n"
        "    assert CliRunner().invoke(app, arguments).exit_code == 0\n"
        "heavy = {'open_clip', 'timm', 'matplotlib', 'sklearn', 'PIL', 'torchvision', 'yaml'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert python(code).stdout.strip() == "[]"


# -- outputs --------------------------------------------------------------------------------------


def test_a_tower_of_another_model_is_refused():
    clip = {"visual.a": torch.ones(2), "visual.b": torch.ones(2), "text": torch.ones(1)}
    with pytest.raises(ValueError, match="3 problems") as error:
        with_visual(clip, {"a": torch.ones(3), "c": torch.ones(1)})
    for fault in ("visual.a must be (3,)", "lacks visual.c", "has visual.b, which"):
        assert fault in str(error.value)


def test_a_tower_takes_the_files_dtypes():
    clip = {"visual.a": torch.ones(2, dtype=torch.float16), "text": torch.ones(1)}
    state = with_visual(clip, {"a": torch.full((2,), 0.1)})
    assert state["visual.a"].dtype == torch.float16 and state["text"] is clip["text"]


def test_loading_code_of_a_stock_model():
    code = loading_code(Path("x/m.safetensors"), "RN50", None, {"std": (1.0, 1.0, 2.0)})
    assert code == (
        "import open_clip\n"
        "model, _, preprocess = open_clip.create_model_and_transforms("
        "'RN50', pretrained='x/m.safetensors', image_std=(1.0, 1.0, 2.0))"
    )
