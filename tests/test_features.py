"""The feature cache: each image once, addressed by content, in memory and on disk."""

import copy
import functools
import multiprocessing

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.utils.data import DataLoader

from neulig_fast import ExpertPool
from neulig_fast.neulig import features as features_module
from neulig_fast.neulig.batches import Peeked, unpack
from neulig_fast.neulig.features import FeatureCache


class Encoder(nn.Module):
    """(B, 2, 3) -> (B, 5), counting the images it has seen."""

    seen = 0

    def __init__(self, act=torch.tanh, tokens=False):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.act, self.tokens = act, tokens

    def forward(self, images):
        Encoder.seen += len(images)
        pooled = self.norm(self.act(self.linear(images.flatten(1))))
        return (pooled, images) if self.tokens else pooled


def experts(count=3, **options):
    torch.manual_seed(1)
    made = [Encoder(**options) for _ in range(count)]
    for expert in made:
        expert.norm.running_mean.normal_()
    return made


@pytest.fixture
def pool():
    return ExpertPool(experts(), names=["a", "b", "c"])


@pytest.fixture
def images():
    return torch.randn(7, 2, 3)


def direct(pool, images):
    """Every expert run on its own, as a module with its weights loaded."""
    rows = []
    for i in range(pool.num_experts):
        module = copy.deepcopy(pool.template)
        module.load_state_dict(pool.state_dict(i))
        with torch.no_grad():
            out = module.eval()(images)
        rows.append(out[0] if isinstance(out, tuple) else out)
    return torch.stack(rows, 1)


@pytest.mark.parametrize("tokens", [False, True], ids=["features", "tuple"])
def test_features_are_those_of_the_experts(images, tokens):
    pool = ExpertPool(experts(tokens=tokens))
    got = FeatureCache(pool).features(images)
    assert torch.equal(got, direct(pool, images)) and not got.requires_grad
    assert got.abs().max() > 0.1


def vit(**options):
    return open_clip.transformer.VisionTransformer(
        image_size=32, patch_size=16, width=16, layers=2, heads=2, mlp_ratio=2.0, output_dim=12,
        **options,
    )  # fmt: skip


def resnet():
    return open_clip.modified_resnet.ModifiedResNet(
        layers=(1, 1, 1, 1), output_dim=12, heads=4, image_size=32, width=8
    )


@pytest.mark.parametrize("make", [vit, lambda: vit(output_tokens=True), resnet])
def test_open_clip_towers_run_as_they_are(make):
    torch.manual_seed(3)
    pool = ExpertPool([make() for _ in range(2)])
    images = torch.randn(3, 3, 32, 32)
    got = FeatureCache(pool, widths={"task": pool.template.output_dim}).features(images)
    assert torch.allclose(got, direct(pool, images), atol=1e-5)


def test_experts_at_once_hold_no_more_rows_than_the_batch(monkeypatch):
    pool, images, sizes = ExpertPool([vit() for _ in range(3)]), torch.randn(7, 3, 32, 32), []
    original = features_module.expert_forward

    def counting(pool, images, **options):
        sizes.append(len(images))
        return original(pool, images, **options)

    monkeypatch.setattr(features_module, "expert_forward", counting)
    cache = FeatureCache(pool)
    got = cache.features(torch.cat([images, images[:2]]))
    assert sizes == [3, 3, 1] and cache.computed == 7
    assert torch.allclose(got, direct(pool, torch.cat([images, images[:2]])), atol=1e-5)
    assert torch.equal(cache.features(images.flip(0)), got[:7].flip(0)) and sum(sizes) == 7


def test_each_expert_sees_each_image_once(pool, images):
    cache = FeatureCache(pool)
    Encoder.seen = 0
    first = cache.features(images)
    batch = torch.cat([images[3:], images[:3], images[:1]])  # other order, one twice
    again = cache.features(batch)
    assert torch.equal(again, torch.cat([first[3:], first[:3], first[:1]]))
    assert Encoder.seen == 3 * 7 and cache.computed == len(cache) == 7
    cache.features(torch.cat([images, images + 1, images + 1]))
    assert Encoder.seen == 3 * 14 and len(cache) == 14


def test_a_training_template_is_put_in_eval_mode(pool, images):
    expected = direct(pool, images)
    pool.template.train()
    assert torch.equal(FeatureCache(pool).features(images), expected)


def test_shape_and_dtype_are_part_of_an_images_key(pool):
    cache = FeatureCache(pool)
    cache.features(torch.zeros(1, 2, 3))
    for other in (torch.zeros(1, 3, 2), torch.zeros(1, 2, 3, dtype=torch.float64)):
        before = cache.computed
        cache.features(other)
        assert cache.computed == before + 1


def test_the_cache_grows_without_moving_rows(pool):
    cache = FeatureCache(pool)
    batches = [torch.randn(size, 2, 3) for size in (1, 2, 30, 4, 100)]
    for batch in batches:
        cache.features(batch)
    everything = cache.features(torch.cat(batches))
    assert torch.allclose(everything, direct(pool, torch.cat(batches)), atol=1e-6)
    assert cache.computed == 137


# -- collect ---------------------------------------------------------------------------------------


def loader(images, labels, size=3):
    return list(zip(images.split(size), labels.split(size), strict=True))


def test_collect_keeps_the_loaders_order(pool, images):
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 3])
    calls = []
    got = FeatureCache(pool).collect(
        loader(images, labels), num_classes=4, advance=lambda: calls.append(1)
    )
    assert torch.allclose(got.features, direct(pool, images), atol=1e-6)
    assert torch.equal(got.labels, labels) and len(calls) == 3 and got.views == 1
    assert len({bytes(key.tolist()) for key in got.keys}) == 7


def test_collect_of_several_views_passes_over_the_loader_again(pool, images):
    class Augmenting:
        def __init__(self):
            self.passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(loader(images + self.passes, torch.zeros(7).long()))

    got = FeatureCache(pool).collect(Augmenting(), num_classes=1, views=3)
    assert got.features.shape == (21, 3, 5) and got.views == 3
    expected = direct(pool, torch.cat([images + k for k in (1, 2, 3)]))
    assert torch.allclose(got.features, expected, atol=1e-6)


def test_labels_are_not_needed_when_they_are_not_used(pool, images):
    cache = FeatureCache(pool)
    assert cache.collect(images.split(2)).labels is None
    assert cache.collect([(images, torch.full((7,), 99))]).labels is None
    assert cache.computed == 7


@pytest.mark.parametrize(
    "batches, error, message",
    [
        ([], ValueError, "letters: the loader is empty"),
        ([torch.zeros(2, 2, 3)], TypeError, r"letters: batch 0 must be \(images, labels\)"),
        ([(torch.zeros(2, 2, 3),)], TypeError, r"must be \(images, labels\)"),
        (
            [(torch.zeros(2, 2, 3), torch.tensor([0, 4]))],
            ValueError,
            r"letters: batch 0: labels must be in \[0, 4\), got \[4\]",
        ),
        ([(torch.zeros(2, 2, 3), [-1, 0])], ValueError, r"in \[0, 4\), got \[-1\]"),
        ([(torch.zeros(2, 2, 3), torch.zeros(3).long())], ValueError, "2 images but 3 labels"),
        ([(torch.zeros(2, 2, 3), torch.zeros(2))], TypeError, r"must be \(B,\) integers"),
        ([(torch.zeros(0, 2, 3), torch.zeros(0).long())], ValueError, "non-empty batch"),
    ],
)
def test_batches_that_are_refused(pool, batches, error, message):
    with pytest.raises(error, match=message):
        FeatureCache(pool).collect(batches, name="letters", num_classes=4)


def test_a_loader_that_can_be_read_only_once_is_found_out(pool, images):
    once = iter(loader(images, torch.zeros(7).long()))
    with pytest.raises(ValueError, match=r"passes of \[7, 0\]"):
        FeatureCache(pool).collect(once, num_classes=1, views=2)


@pytest.mark.parametrize(
    "batch, error, message",
    [
        ({"image": torch.zeros(2, 2, 3)}, TypeError, r"b: images must be a tensor .*, got dict"),
        (np.zeros((2, 3)), TypeError, "b: images must be a tensor .*, got ndarray of 2"),
        (torch.zeros(0, 2, 3), ValueError, r"b: images must be a non-empty batch .*\(0, 2, 3\)"),
        (torch.zeros(3), ValueError, "b: images must be a non-empty batch"),
    ],
)
def test_batches_without_labels_that_are_refused(batch, error, message):
    with pytest.raises(error, match=message):
        unpack(batch, None, "b")


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool], ids=str
)
def test_labels_of_every_integer_type(dtype):
    labels = torch.tensor([0, 1]).to(dtype)
    _, got = unpack((torch.zeros(2, 3), labels), 2, "b")
    assert got.dtype == torch.int64 and got.tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got \[1\]"):
        unpack((torch.zeros(2, 3), labels), 1, "b")


def test_a_look_at_the_first_batch_loses_no_batch_and_counts_as_no_pass():
    class Counting:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([torch.full((2, 3), self.passes + k) for k in (0.0, 0.5)])

    for loader, second in ((Counting(), [2.0, 2.5]), (iter(Counting()), [])):
        peeked = Peeked(loader)
        assert peeked.fault(None, "name") is None
        assert [float(batch[0, 0]) for batch in peeked] == [1.0, 1.5]
        assert [float(batch[0, 0]) for batch in peeked] == second
    assert Peeked([]).fault(None, "name") == "name: the loader is empty"


def test_loaders_that_wait_for_their_turn_keep_no_workers():
    data = DataLoader(torch.zeros(8, 2, 3), batch_size=2, num_workers=1)
    peeked = Peeked(data)
    assert not multiprocessing.active_children()
    assert len(list(peeked)) == 4


# -- what is refused -------------------------------------------------------------------------------


def test_features_that_are_not_finite_name_the_expert():
    pool = ExpertPool([Exploder(0), Exploder(1)], names=["calm", "loud"])
    images = torch.tensor([[1.0] * 6, [2.0] * 6, [0.0] * 6])
    with pytest.raises(ValueError, match="expert 'loud' gives non-finite features for 2 of 3"):
        FeatureCache(pool).features(images)


class Exploder(nn.Module):
    def __init__(self, power):
        super().__init__()
        self.weight = nn.Parameter(torch.full((6, 5), 3e38 if power else 1.0))

    def forward(self, images):
        return images @ self.weight


def test_encoders_of_another_kind_are_refused(pool, images):
    class Tokens(Encoder):
        def forward(self, images):
            return images

    class Clip(Encoder):
        def encode_image(self, images):
            return self(images)

    with pytest.raises(ValueError, match=r"must map \(7, 2, 3\) to \(7, D\), got \(7, 2, 3\)"):
        FeatureCache(ExpertPool([Tokens()])).features(images)
    with pytest.raises(ValueError, match="whole CLIP models"):
        FeatureCache(ExpertPool([Clip()])).features(images)
    with pytest.raises(ValueError, match="no template"):
        FeatureCache(ExpertPool([Encoder().state_dict()])).features(images)


def test_heads_of_another_width_are_named_at_the_first_features(pool, images):
    cache = FeatureCache(pool, widths={"digits": 5, "letters": 6, "shapes": 7})
    with pytest.raises(ValueError, match=r"2 problems(.|\n)*'letters' is for D = 6, .* D = 5"):
        cache.features(images)


# -- on disk ---------------------------------------------------------------------------------------


def test_a_second_process_computes_nothing(pool, images, tmp_path):
    labels = torch.zeros(7).long()
    first = FeatureCache(pool, tmp_path).collect(loader(images, labels), num_classes=1)
    again = FeatureCache(ExpertPool(experts()), tmp_path)
    got = again.collect(loader(images.flip(0), labels), num_classes=1)
    assert again.computed == 0 and torch.equal(got.features, first.features.flip(0))
    again.collect(loader(torch.cat([images, images + 1]), torch.zeros(14).long()), num_classes=1)
    assert again.computed == 7
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    assert len(FeatureCache(pool, tmp_path)) == 14


def test_other_weights_or_another_encoder_share_nothing(images, tmp_path):
    FeatureCache(ExpertPool(experts()), tmp_path).collect([images])
    changed = experts()
    changed[2].linear.weight.data[0, 0] += 1e-3
    for other in (changed, experts(act=torch.relu), experts(count=2)):
        assert len(FeatureCache(ExpertPool(other), tmp_path)) == 0
    assert len(FeatureCache(ExpertPool(experts()), tmp_path)) == 7


class Configured(Encoder):
    """Scaled by something that is neither weight nor buffer."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, images):
        factor = self.factor
        if isinstance(factor, dict):
            factor = factor["k"][0]
        return super().forward(images) * (factor() if callable(factor) else factor)


@pytest.mark.parametrize(
    "made",
    [torch.tensor, lambda k: functools.partial(float, k), lambda k: {"k": [k, torch.ones(0)]}],
    ids=["tensor", "partial", "dict"],
)
def test_settings_of_an_encoder_are_in_the_identity(images, tmp_path, made):
    def cache(factor):
        torch.manual_seed(1)
        return FeatureCache(ExpertPool([Configured(made(factor)) for _ in range(2)]), tmp_path)

    cache(1.0).collect([images])
    assert len(cache(10.0)) == 0 and len(cache(1.0)) == 7


def test_features_of_code_that_changed_are_found_out(images, tmp_path):
    """Two lambdas have one name: the identity is the same, the features are not."""

    def cache(factor):
        torch.manual_seed(1)
        pool = ExpertPool([Configured(lambda: factor) for _ in range(2)], names=["a", "b"])
        return FeatureCache(pool, tmp_path)

    first = cache(1.0)
    first.collect([images[:3]])
    first.collect([images[3:]])
    changed = cache(1.1)
    assert len(changed) == 7
    for store in (True, False):
        with pytest.raises(ValueError, match=rf"{tmp_path}(.|\n)*expert 'a' gives others now"):
            changed.features(images[:1], store=store)
    Encoder.seen = 0
    again = cache(1.0)
    for _ in range(2):
        again.features(images)
    assert Encoder.seen == 2 * 2 and again.computed == 0  # one image of each file by two experts


def test_every_file_is_proven(images, tmp_path):
    """A process with other code may have added one."""

    def cache(factor):
        torch.manual_seed(1)
        return FeatureCache(ExpertPool([Configured(lambda: factor)]), tmp_path)

    cache(1.0).collect([images[:3]])
    cache(2.0).collect([images[3:]])
    mixed = cache(1.0)
    mixed.features(images[:3])
    with pytest.raises(ValueError, match="features of another encoder"):
        mixed.features(images[3:])


def test_clearing_frees_the_memory_and_keeps_the_folder(pool, images, tmp_path):
    cache = FeatureCache(pool, tmp_path)
    expected = cache.features(images)
    cache.clear()
    assert len(cache) == 0 and len(FeatureCache(pool, tmp_path)) == 7
    assert torch.equal(cache.features(images), expected) and cache.computed == 14


def test_what_is_not_stored_is_computed_again(pool, images):
    cache = FeatureCache(pool)
    cache.features(images[:3])
    batch = torch.cat([images, images[5:]])
    for _ in range(2):
        got = cache.features(batch, store=False)
        assert torch.allclose(got, direct(pool, batch), atol=1e-6)
    assert len(cache) == 3 and cache.computed == 3 + 2 * 4


def test_what_was_computed_before_an_error_is_kept(pool, images, tmp_path):
    def breaks_off():
        yield images[:3], torch.zeros(3).long()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeatureCache(pool, tmp_path).collect(breaks_off(), num_classes=1)
    assert len(FeatureCache(pool, tmp_path)) == 3


def test_long_collections_are_written_in_pieces(pool, images, tmp_path, monkeypatch):
    monkeypatch.setattr(features_module, "_FLUSH_BYTES", 2 * 3 * 5 * 4)  # two images
    cache = FeatureCache(pool, tmp_path)
    cache.collect(images.split(2))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4
    assert len(FeatureCache(pool, tmp_path)) == 7


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "not a shard"])
def test_a_damaged_or_foreign_file_is_named(pool, images, tmp_path, damage):
    FeatureCache(pool, tmp_path).collect([images])
    (path,) = tmp_path.rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-1])
    elif damage == "flipped":
        content[-1] ^= 1
        path.write_bytes(content)
    elif damage == "foreign":
        other = FeatureCache(ExpertPool(experts(count=2)), tmp_path / "other")
        other.collect([images])
        (foreign,) = (tmp_path / "other").rglob("*.safetensors")
        path.write_bytes(foreign.read_bytes())
    else:
        safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=rf"features: .*{path.name}.*delete it"):
        FeatureCache(pool, tmp_path)


def test_a_cache_begun_in_inference_mode_goes_on_outside(pool):
    cache, some = FeatureCache(pool), torch.randn(7, 2, 3)
    with torch.inference_mode():
        for images in (some[:4], some[4:5]):  # the second leaves room for more
            cache.features(images)
    got = cache.features(some)
    assert not got.is_inference() and cache.computed == 7
    torch.testing.assert_close(got, FeatureCache(pool).features(some))
