"""The demo's data and its CLIP: same bits, separate splits, files that open_clip reads."""

import dataclasses
import hashlib

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file

from neulig_fast.demo import clip, drawing, pictures, tasks
from neulig_fast.demo.settings import DemoSettings
from neulig_fast.demo.tasks import SPLITS, STYLES, TASK_NAMES, make_task

TOY = DemoSettings.toy()
DIGEST = """
import hashlib
from neulig_fast.demo.tasks import TASK_NAMES, make_task
made = [make_task(name, size=40, seed=3) for name in TASK_NAMES]
print(hashlib.sha256(b"".join(d.images.numpy().tobytes() for d in made)).hexdigest())
"""


# ---- data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", TASK_NAMES)
def test_images_and_labels_are_what_they_are_said_to_be(name, style):
    data = make_task(name, style=style, size=105)
    classes = len(data.class_names)
    assert data.images.shape == (105, 3, 32, 32) and data.images.dtype == torch.uint8
    assert data.labels.shape == (105,) and data.labels.dtype == torch.int64
    counts = torch.bincount(data.labels, minlength=classes)
    assert len(counts) == classes and counts.max() - counts.min() <= 1 and counts.min() >= 1
    assert len(set(data.class_names)) == classes and len(data.templates) == 4
    spread = data.images.float().flatten(1).std(1)
    # A grey shape on dull ground is nearly flat; everything else has contrast.
    assert spread.min() > 1 and spread.median() > 20


@pytest.mark.parametrize("name", TASK_NAMES)
def test_same_arguments_same_images_and_any_other_argument_others(name):
    base = {"split": "train", "style": "domain", "size": 60, "seed": 0}
    first = make_task(name, **base)
    again = make_task(name, **base)
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    seen = {image.numpy().tobytes() for image in first.images}
    assert len(seen) == 60
    for change in ({"split": "test"}, {"split": "validation"}, {"style": "plain"}, {"seed": 1}):
        other = make_task(name, **{**base, **change})
        assert seen.isdisjoint(image.numpy().tobytes() for image in other.images), change


def test_another_process_draws_the_same_images(python):
    made = [make_task(name, size=40, seed=3) for name in TASK_NAMES]
    here = hashlib.sha256(b"".join(d.images.numpy().tobytes() for d in made)).hexdigest()
    ran = python(DIGEST)
    assert ran.stdout.strip() == here, ran.stderr


def test_no_scan_of_a_digit_is_in_two_splits():
    labels = np.arange(3000) % 10
    used = {}
    for split in SPLITS:
        scans = pictures.digit_scans(np.random.default_rng(0), labels, split)
        used[split] = set(scans.tolist())
    assert {split: len(scans) for split, scans in used.items()} == {
        "train": 997, "validation": 300, "test": 500,
    }  # fmt: skip
    assert not used["train"] & used["test"]
    assert not used["train"] & used["validation"]
    assert not used["validation"] & used["test"]


def test_the_test_split_of_digits_shows_every_scan_once():
    scans = pictures.digit_scans(np.random.default_rng(0), np.arange(500) % 10, "test")
    assert len(set(scans.tolist())) == 500


def test_a_digits_picture_shows_its_label():
    """The ink of a plain picture correlates best with the mean scan of its own digit."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    means = np.stack([bunch.images[bunch.target == digit].mean(0).ravel() for digit in range(10)])
    data = make_task("digits", style="plain", split="test", size=500)
    pictures = data.images.float().mean(1)
    # The scan fills the middle half of the picture: pool that down to 8x8 again.
    small = torch.nn.functional.interpolate(pictures[:, None, 2:30, 2:30], (10, 10), mode="area")
    small = small[:, 0, 1:9, 1:9].flatten(1).numpy()
    score = np.abs([[np.corrcoef(row, mean)[0, 1] for mean in means] for row in small])
    assert (score.argmax(1) == data.labels.numpy()).mean() > 0.6


def test_drawn_colours_are_in_the_middle_of_the_picture():
    data = make_task("colours", style="plain", size=120)
    middle = data.images[:, :, 12:20, 12:20].float().flatten(2).median(2).values / 255
    for label, name in ((0, "red"), (3, "green"), (5, "blue")):
        assert data.class_names[label] == name
        strongest = middle[data.labels == label].argmax(1)
        assert (strongest == {"red": 0, "green": 1, "blue": 2}[name]).float().mean() > 0.9


def test_all_wrong_arguments_are_named_at_once():
    with pytest.raises(ValueError, match=r"name must be one of digits.*'dogs'.*split.*seed.*-1"):
        make_task("dogs", split="dev", seed=-1)


def test_shapes_have_their_distances():
    axis = (np.arange(31, dtype=np.float32) - 15) / 10
    x, y = np.meshgrid(axis, axis)
    circle = drawing.shape_distance(np.array([drawing.SHAPES.index("circle")]), x[None], y[None])
    radius = np.hypot(x, y)
    ring = (radius > 0.5) & (radius < 1.4)
    # The circle is a 72-gon, and the atlas's cells are 3/64 wide: bilinear within cell²/(8 radius).
    error = 1 - np.cos(np.pi / 72) + (3 / 64) ** 2 / (8 * 0.5)
    np.testing.assert_allclose(circle[0][ring], radius[ring] - 1, atol=error)


def test_normalise_is_open_clips_transform():
    data = make_task("letters", size=8)
    transform = open_clip.image_transform(32, is_train=False, mean=tasks.MEAN, std=tasks.STD)
    expected = torch.stack(
        [transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in data.images]
    )
    assert torch.equal(tasks.normalise(data.images), expected)
    with pytest.raises(TypeError, match=r"uint8, got torch\.float32"):
        tasks.normalise(expected)


def test_contact_sheet_shows_every_task(tmp_path):
    made = [make_task(name, size=60) for name in TASK_NAMES]
    tasks.contact_sheet(made, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    strips = np.array_split(pixels, len(TASK_NAMES))
    assert all(strip.std() > 30 for strip in strips)


def test_contact_sheet_names_every_class_in_full_and_no_wider_than_its_image(tmp_path, monkeypatch):
    drawn = {}

    def text(pen, place, words, fill, font):
        drawn[words] = font.getlength(words)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    made = [make_task(name, size=60) for name in TASK_NAMES]
    tasks.contact_sheet(made, tmp_path / "sheet.png")
    names = {name for task in made for name in task.class_names}
    assert names <= set(drawn) and "checkerboard" in names
    assert max(drawn[name] for name in names) <= 2 * drawing.SIZE


# ---- the model ---------------------------------------------------------------------------------


def plain_tasks():
    return [
        make_task(name, style="plain", size=4 * len(make_task(name, size=0).class_names))
        for name in TASK_NAMES
    ]


def test_the_expanded_model_says_what_the_cut_one_says():
    made = plain_tasks()
    tokens = clip.used_tokens(made)
    cut = clip.build_model(TOY, len(tokens)).eval()
    full = clip.expand_vocabulary(cut, tokens, TOY)
    prompts = clip.prompt_tokens(made)
    assert full.token_embedding.num_embeddings == 49408 and len(tokens) < 200
    with torch.no_grad():
        for row in prompts:
            short = torch.searchsorted(tokens, row)
            assert torch.equal(tokens[short], row)
            assert torch.equal(full.encode_text(row), cut.encode_text(short))
        images = tasks.normalise(made[0].images)
        assert torch.equal(full.encode_image(images), cut.encode_image(images))


def test_open_clip_loads_the_files_and_its_tokenizer_fits(tmp_path, monkeypatch):
    made = plain_tasks()
    model = clip.build_model(TOY).eval()
    config = clip.write_config(tmp_path, TOY)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    open_clip.add_model_config(config)
    loaded = open_clip.create_model(
        clip.MODEL_NAME, pretrained=str(tmp_path / "model.safetensors")
    ).eval()
    stock = open_clip.get_tokenizer(clip.MODEL_NAME)
    texts = ["the letter Q.", "a pattern of waves.", "something never trained on"]
    assert torch.equal(stock(texts), clip.tokenizer()(texts))
    images = tasks.normalise(made[1].images)
    with torch.no_grad():
        assert torch.equal(loaded.encode_text(stock(texts)), model.encode_text(stock(texts)))
        assert torch.equal(loaded.encode_image(images), model.encode_image(images))


def test_building_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    one, two = clip.build_model(TOY, 50), clip.build_model(TOY, 50)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = clip.build_model(dataclasses.replace(TOY, seed=1), 50)
    key = "visual.conv1.weight"
    assert torch.equal(one.state_dict()[key], two.state_dict()[key])
    assert not torch.equal(one.state_dict()[key], other.state_dict()[key])


def test_prompts_fit_the_context():
    tokens = clip.prompt_tokens(plain_tasks())
    assert tokens.shape == (4, 70, 16)
    # A prompt that was cut off would fill the context to its end.
    assert (tokens[..., -1] == 0).all()
