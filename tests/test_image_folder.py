"""Folders of images as data sets: order, what counts as an image, what is wrong, views."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import to_tensor

from neulig_fast import image_folder
from neulig_fast.image_folder import ImageDataset, ImageLoader, UnreadableImage


def image(path, value=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).convert(mode).save(path)


@pytest.fixture
def root(tmp_path):
    """Two classes; pixel values 0, 10, 20, ... in the order in which files are to be read."""
    folder = tmp_path / "data"
    for k, name in enumerate(["cat/10.png", "cat/9.png", "cat/deep/er/1.PNG", "dog/a.bmp"]):
        image(folder / name, 10 * k)
    for name in ("readme.md", "cat/._9.png", "dog/labels.csv", "cat/.hidden/x.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no image")
    (folder / ".git").mkdir()
    return folder


def test_classes_and_files_are_sorted(root):
    found = image_folder.scan(root)
    assert found.classes == ("cat", "dog") and found.labels == (0, 0, 0, 1)
    names = [path.relative_to(root).as_posix() for path in found.files]
    assert names == ["cat/10.png", "cat/9.png", "cat/deep/er/1.PNG", "dog/a.bmp"]
    assert found.ignored == 3  # the hidden folder is not looked into


def test_batches_come_in_order_and_whole(root):
    dataset = ImageDataset(image_folder.scan(root), to_tensor)
    assert len(dataset) == 4
    for workers in (0, 2):
        loader = ImageLoader(dataset, 3, workers)
        batches = list(loader)
        assert len(loader) == len(batches) == 2
        pixels = torch.cat([batch[0] for batch in batches])[:, 0, 0, 0]
        assert (pixels * 255).round().tolist() == [0, 10, 20, 30]
        labels = torch.cat([batch[1] for batch in batches])
        assert labels.tolist() == [0, 0, 0, 1] and labels.dtype == torch.int64


def test_folders_without_classes_or_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no sub-folders"):
        image_folder.scan(tmp_path)
    image(tmp_path / "full/x.png")
    for name in ("void", "text"):
        (tmp_path / name).mkdir()
    (tmp_path / "text/x.txt").touch()
    with pytest.raises(ValueError, match="class folders without images: text, void"):
        image_folder.scan(tmp_path)


def test_differences_are_listed(root, tmp_path):
    for name in ("cat/1.png", "dgo/1.png", "cow/1.png"):
        image(tmp_path / "test" / name)
    train, test = image_folder.scan(root), image_folder.scan(tmp_path / "test")
    assert image_folder.difference(train, train) is None
    assert str(image_folder.difference(test, train)).endswith("lacks dog; has cow, dgo besides")


def test_files_without_an_images_header_are_named(root):
    for k in range(7):
        (root / f"dog/{k}.jpg").write_bytes(b"GIF?")
    text = str(image_folder.unreadable(image_folder.scan(root)))
    assert "dog/0.jpg is not a readable image" in text
    assert "dog/5.jpg" not in text and text.endswith("and 2 more")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_body_is_named_without_a_traceback(root, workers):
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8))
    noise.save(root / "dog/b.png")
    data = (root / "dog/b.png").read_bytes()
    (root / "dog/b.png").write_bytes(data[: len(data) // 2])
    found = image_folder.scan(root)
    assert image_folder.unreadable(found) is None  # the header is whole
    with pytest.raises(UnreadableImage) as error:
        list(ImageLoader(ImageDataset(found, to_tensor), 2, workers))
    assert str(error.value).startswith(str(root / "dog/b.png")) and "\n" not in str(error.value)


def test_faults_of_a_transform_are_not_blamed_on_the_file(root):
    def broken(image):
        raise ValueError("transform")

    with pytest.raises(ValueError, match=r"^transform$"):
        list(ImageLoader(ImageDataset(image_folder.scan(root), broken), 2))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_images_reach_the_transform_as_they_are(tmp_path, mode):
    """open_clip's transform converts to RGB after resizing, so nothing is converted before."""
    path = tmp_path / ("x/1.tif" if mode == "CMYK" else "x/1.png")
    image(path, 7, mode)
    dataset = ImageDataset(image_folder.scan(tmp_path), lambda picture: picture.mode)
    assert dataset[0] == (mode, 0)


def test_views_are_plain_then_random_and_repeatable(root):
    found = image_folder.scan(root)

    def passes(seed, batch_size, count=4):
        dataset = ImageDataset(found, to_tensor, lambda _: torch.rand(3, 4, 4), seed)
        loader = ImageLoader(dataset, batch_size, views=3)
        return [torch.cat([images for images, _ in loader]) for _ in range(count)]

    before = torch.get_rng_state()
    plain, one, two, again = passes(0, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(plain, passes(5, 4, 1)[0])
    assert torch.equal(plain, again)  # pass 3 is view 0
    assert not torch.equal(one, two) and not torch.equal(one[0], one[1])
    assert torch.equal(one, passes(0, 1)[1])
    assert not torch.equal(one, passes(1, 4)[1])


def test_split_sets_a_fraction_aside(root):
    for k in range(36):
        image(root / f"dog/{k}.png", k)
    found = image_folder.scan(root)
    rest, aside = image_folder.split(found, 0.25, seed=0)
    assert len(aside) == 10 and len(rest) == 30
    assert sorted(rest.files + aside.files) == sorted(found.files)
    for part in (rest, aside):
        assert list(part.files) == sorted(part.files)
        pairs = zip(part.files, part.labels, strict=True)
        assert all(path.relative_to(root).parts[0] == part.classes[y] for path, y in pairs)
    assert image_folder.split(found, 0.25, seed=0)[1] == aside
    assert image_folder.split(found, 0.25, seed=1)[1] != aside


def test_split_needs_something_left(tmp_path):
    image(tmp_path / "x/1.png")
    with pytest.raises(ValueError, match=r"1 images, too few to set 0\.1 of them aside"):
        image_folder.split(image_folder.scan(tmp_path), 0.1, 0)


def test_unlabelled_images_are_gathered_in_an_order_of_their_own(root):
    found = image_folder.gather(root, seed=0)
    names = {path.relative_to(root).as_posix() for path in found.files}
    assert names == {"cat/10.png", "cat/9.png", "cat/deep/er/1.PNG", "dog/a.bmp"}
    assert found.ignored == 3 and set(found.labels) == {0}
    for k in range(200):
        image(root / f"cat/{k + 100}.png")
        image(root / f"dog/{k}.png")
    many = image_folder.gather(root, seed=0)
    dogs = sum("dog" in path.parts for path in many.files[:100])
    assert 30 < dogs < 70  # a batch is a mixture
    assert [path for path in many.files if path in found.files] == list(found.files)
    assert many.files != image_folder.gather(root, seed=1).files


def test_a_folder_without_any_image_is_refused(tmp_path):
    (tmp_path / "x.txt").touch()
    with pytest.raises(ValueError, match=r"no images \(\.bmp, .*\) at any depth"):
        image_folder.gather(tmp_path, 0)


def test_class_names():
    named = image_folder.named
    assert named(["a_b", "c"], None) == ["a b", "c"]
    assert named(["a_b", "c"], {"c": "sea"}) == ["a b", "sea"]
    assert named(["a", "b"], ["x", "y"]) == ["x", "y"]
    assert named(["00", "01", "10"], ["x", "y", "z"]) == ["x", "y", "z"]
    with pytest.raises(ValueError, match="'d'"):
        named(["a", "b"], {"d": "x"})
    with pytest.raises(ValueError, match="1 names for 2 class folders"):
        named(["a", "b"], ["x"])
    with pytest.raises(ValueError, match="ambiguous"):
        named(["1", "10", "2"], ["one", "two", "ten"])
