"""Merge modes: per_sample against separately merged models, and who gets which weights."""

import copy
import warnings

import open_clip
import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import nn

from neulig_fast.neulig import modes
from neulig_fast.neulig.engine import NeuLig
from neulig_fast.neulig.heads import Head
from neulig_fast.pool import ExpertPool

EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64 against float64, another order of operations
D, CLASSES = 8, 5


def vit():
    return VisionTransformer(
        image_size=16, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2, output_dim=D
    )


def resnet():
    net = ModifiedResNet(layers=[1, 1, 1, 1], output_dim=D, heads=4, image_size=32, width=8)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, D))


SIZES = {vit: (3, 16, 16), resnet: (3, 32, 32), mlp: (3, 2, 2)}
ENCODERS = pytest.mark.parametrize("build", [vit, resnet])


def engine_of(build, count=3, tasks=("a", "b")):
    experts = [build().double() for _ in range(count)]
    heads = {task: Head(torch.randn(CLASSES, D, dtype=torch.float64)) for task in tasks}
    engine = NeuLig(ExpertPool(experts), heads, seed=1)
    with torch.no_grad():
        engine.portland.weight.mul_(20)  # CoopVecs that differ from sample to sample
    return engine


def images_for(build, count):
    return torch.randn(count, *SIZES[build], dtype=torch.float64)


def weights_for(count, experts=3):
    return torch.softmax(2 * torch.randn(count, experts, dtype=torch.float64), 1)


def merged_one_by_one(engine, images, weights):
    """Every image through a module of its own, filled by ``load_state_dict``."""
    module = copy.deepcopy(engine.pool.template).eval()
    outputs = []
    for image, w in zip(images, weights, strict=True):
        module.load_state_dict(engine.pool.blend(w))
        with torch.no_grad():
            outputs.append(module(image[None]))
    return torch.cat(outputs)


@ENCODERS
@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_per_sample_is_one_merged_model_per_image(build, chunk):
    engine, images, weights = engine_of(build), images_for(build, 5), weights_for(5)
    with warnings.catch_warnings():
        # What torch warns of when vmap runs an operator sample by sample.
        warnings.filterwarnings("error", message=".*batching rule.*")
        logits = engine.merged_forward(images, "a", mode="per_sample", weights=weights, chunk=chunk)
    expected = engine.heads["a"](merged_one_by_one(engine, images, weights))
    torch.testing.assert_close(logits, expected, **EXACT)


@ENCODERS
def test_per_sample_uses_the_coopvecs_of_the_engine(build):
    engine, images = engine_of(build), images_for(build, 4)
    given = engine.merged_forward(images, "a", weights=engine.coopvec(images))
    torch.testing.assert_close(engine.merged_forward(images, "a"), given, **EXACT)


@ENCODERS
def test_one_hot_weights_give_the_expert_itself(build):
    engine, images = engine_of(build), images_for(build, 6)
    picked = torch.tensor([0, 1, 2, 2, 1, 0])
    weights = nn.functional.one_hot(picked, 3).double()
    logits = engine.merged_forward(images, "b", weights=weights)
    features = engine.features(images)[torch.arange(6), picked]
    torch.testing.assert_close(logits, engine.heads["b"](features), **EXACT)


@ENCODERS
def test_identical_experts_are_any_blend(build):
    expert = build().double()
    heads = {"a": Head(torch.randn(CLASSES, D, dtype=torch.float64))}
    engine = NeuLig(ExpertPool([expert, expert, expert]), heads)
    images = images_for(build, 4)
    logits = engine.merged_forward(images, "a", weights=weights_for(4))
    with torch.no_grad():
        expected = heads["a"](expert.eval()(images))
    torch.testing.assert_close(logits, expected, **EXACT)


def test_single_images_make_all_batch_modes_equal():
    engine, images = engine_of(vit), images_for(vit, 1)
    per_sample, first, mean = (
        engine.merged_forward(images, "a", mode=mode)
        for mode in ("per_sample", "first_sample", "batch_mean")
    )
    torch.testing.assert_close(per_sample, first, **EXACT)
    torch.testing.assert_close(per_sample, mean, **EXACT)


def test_permuting_the_experts_permutes_the_weights():
    engine, images, weights = engine_of(vit), images_for(vit, 4), weights_for(4)
    order = [2, 0, 1]
    shuffled = NeuLig(
        ExpertPool([engine.pool.state_dict(i) for i in order], engine.pool.template),
        engine.heads,
    )
    torch.testing.assert_close(
        shuffled.merged_forward(images, "a", weights=weights[:, order]),
        engine.merged_forward(images, "a", weights=weights),
        **EXACT,
    )


@pytest.mark.parametrize(
    ("mode", "vector"),
    [
        ("first_sample", lambda e, w: w[0]),
        ("batch_mean", lambda e, w: w.mean(0)),
        ("uniform", lambda e, w: torch.full((3,), 1 / 3, dtype=torch.float64)),
        ("dataset", lambda e, w: e.calibration["a"]),
        ("hard", lambda e, w: torch.tensor([0.0, 1.0, 0.0]).double()),
        ("global", lambda e, w: torch.tensor([0.45, 0.45, 0.1], dtype=torch.float64)),
    ],
)
def test_modes_with_one_model_per_batch(mode, vector):
    engine, images = engine_of(mlp), images_for(mlp, 7)
    engine.calibration = {
        "a": torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64),
        "b": torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64),
    }
    logits = engine.merged_forward(images, "a", mode=mode)
    w = vector(engine, engine.coopvec(images)).expand(7, 3)
    expected = engine.heads["a"](merged_one_by_one(engine, images, w))
    torch.testing.assert_close(logits, expected, **EXACT)
    head = engine.merged_forward(images, engine.heads["a"], mode=mode)
    assert torch.equal(logits, head)


def test_weights_have_a_gradient_in_every_mode_that_uses_them():
    engine, images = engine_of(mlp), images_for(mlp, 3)
    per_image, vector = weights_for(3).requires_grad_(), weights_for(1)[0].requires_grad_()
    for mode in ("per_sample", "batch_mean", "first_sample"):
        assert torch.autograd.gradcheck(
            lambda w, mode=mode: engine.merged_forward(images, "a", mode, weights=w), per_image
        )
    assert torch.autograd.gradcheck(
        lambda w: engine.merged_forward(images, "a", "dataset", weights=w), vector
    )


# -- heads ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_head_that_was_given_is_its_tasks(dtype):
    linear = nn.Linear(D, CLASSES, dtype=dtype)
    given = {"a": Head(linear.weight, linear.bias), "b": Head(linear.weight)}
    engine = NeuLig(ExpertPool([mlp().double() for _ in range(3)]), given)
    engine.calibration = {"a": weights_for(1)[0], "b": weights_for(1)[0]}
    images = images_for(mlp, 3)
    for task, head in given.items():
        expected = engine.merged_forward(images, task, "dataset")
        for same in (head, engine.heads[task], Head(head.weight.detach().clone(), head.bias)):
            logits = engine.merged_forward(images, same, "dataset")
            assert torch.equal(logits, expected) and not logits.requires_grad
            assert not engine.ensemble(images, same).requires_grad
    other = Head(linear.weight.detach() + 1)
    known, tasks = modes.resolve_head(engine, other)
    assert tasks == () and known.weight.dtype == torch.float64


def test_a_head_of_two_tasks_needs_the_tasks_name():
    head = Head(torch.randn(CLASSES, D).double())
    engine = NeuLig(ExpertPool([mlp().double() for _ in range(3)]), {"a": head, "b": head})
    engine.calibration = {"a": weights_for(1)[0], "b": weights_for(1)[0]}
    images = images_for(mlp, 3)
    for mode in ("dataset", "hard"):
        with pytest.raises(ValueError, match="the head is that of a, b: name the task"):
            engine.merged_forward(images, head, mode)
        engine.merged_forward(images, "b", mode)
        engine.merged_forward(images, head, mode, weights=weights_for(1)[0])
    for mode in ("per_sample", "batch_mean", "first_sample", "global", "uniform"):
        engine.merged_forward(images, head, mode)


# -- running -------------------------------------------------------------------------------------


def test_every_forward_is_in_eval_mode_and_no_module_changes():
    experts = [resnet().double().train() for _ in range(3)]
    experts[0].layer2.eval()
    head = Head(torch.randn(CLASSES, D, dtype=torch.float64))
    engine = NeuLig(ExpertPool(experts), {"a": head})
    before = [[part.training for part in expert.modules()] for expert in experts]
    images, weights = images_for(resnet, 2), weights_for(2)
    expected = head(merged_one_by_one(engine, images, weights))
    for chunk in (1, 2):
        logits = engine.merged_forward(images, "a", weights=weights, chunk=chunk)
        torch.testing.assert_close(logits, expected, **EXACT)
    one = engine.merged_forward(images, "a", "first_sample", weights=weights)
    torch.testing.assert_close(one[:1], expected[:1], **EXACT)
    engine.features(images)
    assert [[part.training for part in expert.modules()] for expert in experts] == before
    for state in (experts[0].state_dict(), engine.pool.state_dict(0)):
        counters = [t for name, t in state.items() if name.endswith("num_batches_tracked")]
        assert counters and not any(counters)


class Positions(nn.Module):
    """Reads a buffer that no state dict holds."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, D)
        self.register_buffer("positions", torch.linspace(-1, 1, 12), persistent=False)

    def forward(self, images):
        return self.linear(images.flatten(1) + self.positions)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_buffers_that_are_not_saved_follow_the_pool(dtype):
    experts = [Positions() for _ in range(3)]
    engine = NeuLig(ExpertPool(experts, dtype=dtype), {"a": Head(torch.randn(CLASSES, D))})
    images = images_for(mlp, 4).to(dtype)
    experts = [copy.deepcopy(expert).to(dtype) for expert in experts]
    with torch.no_grad():
        expected = torch.stack([expert(images) for expert in experts], 1)
    assert torch.equal(engine.features(images), expected)
    for chunk in (1, 2):
        assert engine.merged_forward(images, "a", chunk=chunk).shape == (4, CLASSES)
    assert engine.pool.template.positions.dtype == torch.float32


class Hostile(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.linear, self.way = nn.Linear(12, D), way

    def forward(self, images):
        return self.way(self.linear(images.flatten(1)))


@pytest.mark.parametrize(
    "way",
    [
        lambda z: z if z.sum() > 0 else 2 * z,
        lambda z: z + z[0, 0].item(),
        lambda z: torch.zeros(z.shape, dtype=z.dtype).add_(z),
        lambda z: torch.from_numpy(z.detach().numpy()),
    ],
    ids=["branch", "item", "in place", "numpy"],
)
def test_what_vmap_cannot_batch_names_chunk_1(way):
    engine = engine_of(lambda: Hostile(way))
    images, weights = images_for(mlp, 3), weights_for(3)
    with pytest.raises(ValueError, match="pass chunk=1 to run them one at a time"):
        engine.merged_forward(images, "a", weights=weights)
    with torch.no_grad():
        logits = engine.merged_forward(images, "a", weights=weights, chunk=1)
    expected = engine.heads["a"](merged_one_by_one(engine, images, weights))
    torch.testing.assert_close(logits, expected, **EXACT)


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_an_encoders_own_error_stays_what_it_is(error):
    def fails(z):
        if error is RuntimeError or torch._C._functorch.is_batchedtensor(z):
            raise error("no such luck")
        return z

    engine = engine_of(lambda: Hostile(fails))
    with pytest.raises(error, match="no such luck"):
        engine.merged_forward(images_for(mlp, 3), "a", weights=weights_for(3))


def test_settings_of_torch_are_restored_even_after_an_error():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, images):
            raise ArithmeticError

    engine = engine_of(vit)
    engine.merged_forward(images_for(vit, 2), "a")
    pool = ExpertPool([Broken().double(), Broken().double()])
    with pytest.raises(ArithmeticError):
        modes.per_sample_features(pool, images_for(vit, 2), weights_for(2, 2), chunk=2)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()


def test_a_merged_vit_loads_into_open_clip():
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    clip = open_clip.CLIP(embed_dim=D, vision_cfg=vision, text_cfg=text)
    experts = [copy.deepcopy(clip.visual) for _ in range(2)]
    for parameter in experts[1].parameters():
        nn.init.normal_(parameter, std=0.1)
    engine = NeuLig(ExpertPool(experts), {"a": Head(torch.randn(CLASSES, D))})
    images = torch.randn(3, 3, 16, 16)
    state = engine.merge("dataset", loader=[(images, torch.zeros(3, dtype=torch.int64))])
    clip.visual.load_state_dict(state)
    with torch.no_grad():
        expected = engine.heads["a"](clip.visual.eval()(images))
    weights = engine.coopvec(images).mean(0)
    actual = engine.merged_forward(images, "a", "dataset", weights=weights)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_pools_give_logits_close_to_double(dtype):
    exact = engine_of(vit)
    states = [exact.pool.state_dict(i) for i in range(3)]
    engine = NeuLig(ExpertPool(states, vit(), dtype=dtype), exact.heads)
    images, weights = images_for(vit, 5), weights_for(5)
    logits = engine.merged_forward(images.float(), "a", weights=weights)
    expected = exact.merged_forward(images, "a", weights=weights)
    error = (logits - expected).norm() / expected.norm()
    assert error < 20 * torch.finfo(dtype).eps  # two blocks of rounded matrix products


def test_without_a_template_the_error_says_so():
    engine = engine_of(mlp)
    states = [engine.pool.state_dict(i) for i in range(3)]
    bare = NeuLig(ExpertPool(states), engine.heads)
    assert set(bare.merge("uniform")) == set(states[0])
    with pytest.raises(ValueError, match="no template"):
        bare.merged_forward(images_for(mlp, 2), "a", "uniform")


# -- merge ---------------------------------------------------------------------------------------


def test_merge_by_a_calibration_set_ignores_batch_size_and_order():
    engine, images = engine_of(mlp), images_for(mlp, 10)
    w = engine.coopvec(images).mean(0)
    expected = engine.pool.blend(w)
    shuffled = images[torch.randperm(10)]
    for loader in (
        [(images, None)],
        [images],
        list(shuffled.split(3)),
        iter([(part, None) for part in shuffled.split(4)]),
    ):
        merged = engine.merge("dataset", loader=loader)
        assert list(merged) == list(expected)
        for name, tensor in merged.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-13)


def test_merge_modes():
    engine = engine_of(mlp)
    engine.calibration = {"a": weights_for(1)[0], "b": weights_for(1)[0]}
    both = (engine.calibration["a"] + engine.calibration["b"]) / 2
    winner = int(engine.calibration["b"].argmax())
    name = "1.weight"
    for merged, expected in (
        (engine.merge("dataset", task="b"), engine.pool.blend(engine.calibration["b"])),
        (engine.merge("global"), engine.pool.blend(both)),
        (engine.merge("uniform"), engine.pool.blend(torch.full((3,), 1 / 3, dtype=torch.float64))),
        (engine.merge("hard", task="b"), engine.pool.state_dict(winner)),
        (engine.merge("dataset", weights=both), engine.pool.blend(both)),
    ):
        torch.testing.assert_close(merged[name], expected[name], rtol=1e-12, atol=1e-13)


def test_merging_does_not_touch_the_experts():
    engine = engine_of(resnet)
    before = engine.pool.params.clone()
    merged = engine.merge("uniform", batchnorm="mixture_moments")
    for tensor in merged.values():
        if tensor.is_floating_point():
            tensor.fill_(7)
    assert torch.equal(engine.pool.params, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e, x: e.merged_forward(x, "a", mode="datset"), "did you mean 'dataset'"),
        (lambda e, x: e.merged_forward(x, "c", mode="uniform"), "unknown task 'c' .known: a, b"),
        (lambda e, x: e.merged_forward(x, "a", mode="dataset"), "calibration"),
        (lambda e, x: e.merged_forward(x, "a", mode="global"), "calibration"),
        (lambda e, x: e.merged_forward(x, Head(e.heads["a"].weight + 1), "hard"), "no task"),
        (lambda e, x: e.merged_forward(x[:0], "a"), "at least one image"),
        (lambda e, x: e.merged_forward(x, "a", weights=weights_for(3)), r"\(B, N\) = \(2, 3\)"),
        (lambda e, x: e.merged_forward(x, "a", "dataset", weights=weights_for(2)), r"\(N,\)"),
        (lambda e, x: e.merged_forward(x, "a", "uniform", weights=weights_for(2)), "no weights"),
        (lambda e, x: e.merged_forward(x, "a", batchnorm="blnd"), "did you mean 'blend'"),
        (lambda e, x: e.merge("per_sample"), "per image or per batch"),
        (lambda e, x: e.merge("dataset", loader=[]), "empty"),
        (lambda e, x: e.merge("dataset", task="z"), "unknown task 'z' .known: a, b"),
        (lambda e, x: e.merge("uniform", task="z"), "unknown task 'z'"),
        (lambda e, x: e.merge("dataset", task="b"), "of task 'b': fit.. stores"),
        (lambda e, x: e.merge(), "mode 'dataset': name the task, one of a, b"),
        (lambda e, x: e.merge("hard"), "mode 'hard': name the task, one of a, b"),
        (lambda e, x: e.merge("hard", task="a", batchnorm="blnd"), "did you mean 'blend'"),
        (lambda e, x: e.merged_forward(x, "a", chunk=0), "chunk must be a positive integer"),
        (lambda e, x: e.merged_forward(x, "a", chunk=2.0), "chunk must be a positive integer"),
    ],
)
def test_bad_arguments_are_named(call, message):
    engine = engine_of(mlp)
    engine.calibration = {}
    with pytest.raises(ValueError, match=message):
        call(engine, images_for(mlp, 2))


@pytest.mark.parametrize("head", [nn.Linear(D, CLASSES), None, 3])
def test_what_is_no_head_is_named(head):
    engine = engine_of(mlp)
    with pytest.raises(TypeError, match=f"head must be a Head or .*, got {type(head).__name__}"):
        engine.merged_forward(images_for(mlp, 2), head)


# -- task arithmetic -----------------------------------------------------------------------------


def test_task_arithmetic_is_its_formula():
    engine, base = engine_of(resnet), resnet().double().state_dict()
    merged = modes.task_arithmetic(engine.pool, base, scale=0.4)
    states = [engine.pool.state_dict(i) for i in range(3)]
    for name in ("conv1.weight", "bn1.bias", "attnpool.c_proj.weight"):
        expected = base[name] + 0.4 * sum(state[name] - base[name] for state in states)
        torch.testing.assert_close(merged[name], expected, **EXACT)
    variance = sum(state["bn1.running_var"] for state in states) / 3
    torch.testing.assert_close(merged["bn1.running_var"], variance, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_task_arithmetic_is_rounded_once(dtype):
    base = torch.randn(400, 16)
    experts = [{"w": (base + 2e-3 * torch.randn(400, 16)).to(dtype)} for _ in range(16)]
    base = base.to(dtype)
    merged = modes.task_arithmetic(ExpertPool(experts), {"w": base})["w"]
    exact = base.double() + 0.3 * sum(e["w"].double() - base.double() for e in experts)
    half_a_step = torch.finfo(dtype).eps / 2 * exact.abs()
    sums = 40 * torch.finfo(torch.float32).eps  # of 16 differences of values below 5
    assert merged.dtype == dtype
    assert bool(((merged.double() - exact).abs() <= half_a_step * (1 + 1e-6) + sums).all())


def test_task_arithmetic_lists_what_does_not_fit():
    engine, base = engine_of(mlp), mlp().double().state_dict()
    del base["1.weight"]
    base["3.bias"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"(?s)1\.weight is missing.*3\.bias must be \(8,\)"):
        modes.task_arithmetic(engine.pool, base)


@pytest.mark.parametrize("mode", modes.MODES)
def test_autocast_changes_neither_coopvecs_nor_features(mode):
    engine = NeuLig(ExpertPool([mlp() for _ in range(3)]), {"a": Head(torch.randn(CLASSES, D))})
    engine.calibration = {"a": weights_for(1)[0]}
    images, seen = torch.randn(4, *SIZES[mlp]), []
    engine.heads["a"] = lambda features: seen.append(features)
    coopvec = engine.coopvec(images)
    engine.merged_forward(images, "a", mode=mode)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(engine.coopvec(images), coopvec)
        engine.merged_forward(images, "a", mode=mode)
    assert torch.equal(*seen) and seen[1].dtype == torch.float32


@pytest.mark.parametrize("mode", modes.MODES)
def test_images_that_are_no_tensor_are_named(mode):
    engine = engine_of(mlp)
    with pytest.raises(TypeError, match="merged_forward: images must be a tensor, got list"):
        engine.merged_forward([1.0], "a", mode=mode)
