"""The configuration of ``neulig-fast train``: what it takes, and how it says what is wrong."""

from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from torch.overrides import TorchFunctionMode

from neulig_fast.neulig.modes import MODES
from neulig_fast.train_config import _FILES_OF_WEIGHTS, FitConfig, TrainConfig, load_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def valid(tmp_path):
    """A configuration whose files and folders exist, next to which the YAML file is written."""
    for name in ("a.pt", "b.safetensors"):
        (tmp_path / name).touch()
    for name in ("train", "test", "val"):
        (tmp_path / "data" / name).mkdir(parents=True)
    return {
        "model": "ViT-B-32",
        "experts": {"one": "a.pt", "two": "b.safetensors"},
        "tasks": {"one": {"train": "data/train", "test": "data/test"}},
        "output": "out",
    }


@pytest.fixture
def load(tmp_path):
    def write_and_load(content):
        path = tmp_path / "config.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return load_config(path)

    return write_and_load


def test_paths_are_relative_to_the_file(valid, load, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    config = load(valid)
    assert config.experts == {"one": tmp_path / "a.pt", "two": tmp_path / "b.safetensors"}
    assert config.tasks["one"].train == tmp_path / "data/train"
    assert config.output == tmp_path / "out"
    assert not config.output.exists()


def test_pretrained_is_a_file_or_stays_a_tag(valid, load, tmp_path):
    assert load({**valid, "pretrained": "a.pt"}).pretrained == str(tmp_path / "a.pt")
    assert load({**valid, "pretrained": "openai"}).pretrained == "openai"
    assert load(valid).pretrained is None


@pytest.mark.parametrize("name", ["base.safetensors", "old/base", "./base", "base.ckpt"])
def test_pretrained_that_is_called_like_a_file_must_be_one(valid, load, tmp_path, name):
    valid["experts"]["one"] = "gone.pt"
    with pytest.raises(ValueError, match="yaml: 2 problems") as error:
        load({**valid, "pretrained": name})
    assert f"pretrained: {(tmp_path / name).resolve()} is no file" in str(error.value)


def test_no_tag_is_called_like_a_file():
    tags = {tag for _, tag in open_clip.list_pretrained()}
    assert tags and not [tag for tag in tags if "/" in tag or Path(tag).suffix in _FILES_OF_WEIGHTS]


def test_numbers_are_names_too(valid, load):
    names = {0: "zero", 1: 7}
    valid["tasks"] = {2024: {**valid["tasks"]["one"], "class_names": names}}
    config = load(valid)
    assert config.tasks["2024"].class_names == {"0": "zero", "1": "7"}


def test_floats_without_a_point_are_numbers(valid, load):
    """YAML 1.1 reads 1e-3 as text."""
    assert load({**valid, "fit": {"lr": "1e-3"}}).fit.lr == 1e-3


def test_defaults_are_the_engines():
    import inspect

    from neulig_fast.neulig import NeuLig

    ours = FitConfig()
    for function in (NeuLig.__init__, NeuLig.fit):
        for name, argument in inspect.signature(function).parameters.items():
            if name in FitConfig.model_fields and name != "validation":
                assert getattr(ours, name) == argument.default, name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"modle": "x"}, "modle: unknown key; did you mean 'model'?"),
        ({"zzz": 1}, "zzz: unknown key (known: model, experts,"),
        ({"fit": {"epohcs": 3}}, "fit.epohcs: unknown key; did you mean 'epochs'?"),
        ({"evaluate": {"mode": ["hard"]}}, "evaluate.mode: unknown key; did you mean 'modes'?"),
        ({"fit": {"epochs": 0}}, "fit.epochs: input should be greater than or equal to 1, got 0"),
        ({"fit": {"epochs": "many"}}, "fit.epochs: input should be a valid integer"),
        ({"fit": {"patience": True}}, "fit.patience: takes no true or false"),
        ({"fit": {"lr": float("nan")}}, "fit.lr: input should be"),
        ({"fit": {"validation": 1.0}}, "fit.validation: input should be less than 1, got 1.0"),
        ({"fit": {"alignment": "varience"}}, "got 'varience'; did you mean 'variance'?"),
        ({"fit": {"boosting": "sup"}}, "fit.boosting: must be one of supervised, entropy"),
        ({"fit": 3}, "fit: input should be a valid dictionary"),
        ({"evaluate": {"modes": ["harde"]}}, "evaluate.modes.0: must be one of per_sample"),
        ({"evaluate": {"modes": []}}, "evaluate.modes: must not be empty"),
        ({"evaluate": {"batchnorm": "blen"}}, "evaluate.batchnorm: must be one of blend"),
        ({"preprocess": {"mean": [1, 2]}}, "preprocess.mean.2: is missing"),
        ({"device": "cud"}, "device: must be auto, cpu, cuda, cuda:1 or xpu, got 'cud'"),
        ({"device": "cuda:99"}, "device: there is no cuda:99 here"),
        ({"model": 3}, "model: input should be a valid string, got 3"),
        ({"model": "none.json"}, "none.json is no file"),
        ({"experts": {}}, "experts: must not be empty"),
        ({"experts": {"x": "nowhere.pt"}}, "nowhere.pt is no file"),
        ({"experts": {"x": "data"}}, "data is a folder, not a file"),
        ({"experts": {"a/b": "a.pt"}}, "experts.a/b: names are of letters"),
        ({"experts": {"mean": "a.pt"}}, "experts.mean: the name 'mean' is taken"),
        ({"experts": {False: "a.pt"}}, "experts: YAML reads yes, no, on and off"),
        ({"tasks": {}}, "tasks: must not be empty"),
        ({"output": "a.pt/out"}, "a.pt is a file, not a folder"),
        ({"batch_size": 0}, "batch_size: input should be greater"),
    ],
)
def test_a_fault_is_named_with_its_place(valid, load, change, message):
    with pytest.raises(ValueError) as error:
        load({**valid, **change})
    assert message in str(error.value)


def test_a_device_without_float64_is_refused(valid, load):
    class NoFloat64(TorchFunctionMode):
        """What MPS says."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.empty and (kwargs or {}).get("dtype") == torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
            return func(*args, **(kwargs or {}))

    with NoFloat64(), pytest.raises(ValueError, match="device: cpu has no float64, in which"):
        load({**valid, "device": "cpu"})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"trian": "data/train"}, "tasks.one.trian: unknown key; did you mean 'train'?"),
        ({"train": "data/none"}, "data/none is no folder"),
        ({"test": "a.pt"}, "a.pt is a file, not a folder"),
        ({"templates": ["a photo"]}, "tasks.one.templates.0: a template holds {}"),
        ({"templates": []}, "tasks.one.templates: must not be empty"),
        ({"class_names": [True]}, "tasks.one.class_names: YAML reads yes"),
    ],
)
def test_a_fault_in_a_task_is_named_with_its_place(valid, load, change, message):
    valid["tasks"]["one"].update(change)
    with pytest.raises(ValueError) as error:
        load(valid)
    assert message in str(error.value)


def test_all_faults_come_in_one_error(valid, load):
    del valid["output"]
    faulty = {**valid, "modle": 1, "fit": {"epohcs": 2, "lr": -1}, "experts": {"x": "nofile"}}
    with pytest.raises(ValueError, match=r"config\.yaml: 5 problems") as error:
        load(faulty)
    text = str(error.value)
    for place in ("output: is missing", "modle:", "fit.epohcs:", "fit.lr:", "experts.x:"):
        assert f"\n  - {place}" in text


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        ("- 1\n", "holds a list"),
        ("a: [1, 2\nb: 3\n", "line 2, column 2:"),
        ("a: 1\nb: 2\na: 3\n", "line 3, column 1: the key 'a' appears twice"),
        ('a: !!python/object/apply:os.system ["touch hacked"]\n', "!!python are not allowed"),
    ],
)
def test_broken_yaml_is_placed(load, tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        load(text)
    assert "config.yaml: " in str(error.value) and message in str(error.value)
    assert not (tmp_path / "hacked").exists()


def test_what_is_no_text_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        load_config(path)
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "none.yaml")


def test_every_mode_is_allowed(valid, load):
    assert load({**valid, "evaluate": {"modes": list(MODES)}}).evaluate.modes == MODES


def _keys(model, prefix=""):
    """Every key of the file, as ``fit.epochs``; those of a task as ``tasks.<name>.train``."""
    for name, field in model.model_fields.items():
        yield prefix + name
        annotation = field.annotation
        inner = getattr(annotation, "__args__", (annotation,))[-1]
        if hasattr(inner, "model_fields"):
            dot = f"{name}.<name>." if inner is not annotation else f"{name}."
            yield from _keys(inner, prefix + dot)


def test_every_key_is_documented():
    text = (ROOT / "docs/train.md").read_text()
    missing = [key for key in _keys(TrainConfig) if f"`{key}`" not in text]
    assert not missing


def test_the_example_is_valid_but_for_its_paths(tmp_path, monkeypatch):
    content = yaml.safe_load((ROOT / "examples/train.yaml").read_text())
    for path in (*content["experts"].values(), content["pretrained"]):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    for task in content["tasks"].values():
        for key in {"train", "val", "test"} & set(task):
            (tmp_path / task[key]).mkdir(parents=True)
    path = tmp_path / "train.yaml"
    path.write_text((ROOT / "examples/train.yaml").read_text())
    assert len(load_config(path).experts) >= 2
