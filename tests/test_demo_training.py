"""The demo's training: it learns, and its bits depend on the seed alone."""

import dataclasses

import pytest
import torch

from neulig_fast.demo import clip, tasks, training
from neulig_fast.demo.muon import orthogonal
from neulig_fast.demo.settings import DemoSettings
from neulig_fast.demo.tasks import TASK_NAMES, make_task

TOY = DemoSettings.toy()


@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (64, 64)])
def test_orthogonal_keeps_the_singular_vectors(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    # One spectrum that five steps can flatten.
    values = torch.linspace(1.0, 0.1, len(values), dtype=torch.float64)
    mapped = left.mT @ orthogonal(left * values @ right) @ right.mT
    diagonal = mapped.diagonal()
    assert diagonal.min() > 0.6 and diagonal.max() < 1.3
    off = mapped - torch.diag(diagonal)
    assert off.abs().max() < 1e-12


@pytest.fixture(scope="module")
def pretrained():
    losses = []
    made = [
        make_task(name, style="plain", size=8 * len(make_task(name, size=0).class_names))
        for name in TASK_NAMES
    ]
    model = training.pretrain(made, TOY, lambda step, steps, loss: losses.append(loss))
    return made, model, losses


def head_weights(made):
    """Heads that tell the classes well apart: orthogonal rows, as far out as CLIP's scale."""
    generator = torch.Generator().manual_seed(1)
    return {
        task.name: 14 * orthogonal(torch.randn(len(task.class_names), 128, generator=generator))
        for task in made
    }


def test_pretraining_learns_and_gives_the_same_bits_on_any_number_of_threads(pretrained):
    made, model, losses = pretrained
    assert len(losses) == TOY.pretrain_steps
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    one_thread = dataclasses.replace(TOY, threads=1)
    again = training.pretrain(made, one_thread).state_dict()
    assert all(torch.equal(again[name], t) for name, t in model.state_dict().items())


def test_the_shards_gradients_are_the_batchs(pretrained):
    made, _, _ = pretrained
    model = clip.build_model(TOY, 10).double()
    prompts = torch.tensor([[1, 2, 9], [1, 3, 9], [4, 5, 9]])
    prompts = torch.nn.functional.pad(prompts, (0, 13))
    images = tasks.normalise(made[0].images[:6]).double()
    labels = torch.tensor([0, 1, 2, 0, 1, 1])
    with training.thread_pool(2) as pool:
        loss = training._contrast(pool, model, prompts, images, labels)
    features = model(images, prompts)
    logits = model.logit_scale.exp() * features[0] @ features[1].T
    expected = torch.nn.functional.cross_entropy(logits, labels)
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_fine_tuning_learns_gives_the_same_bits_and_leaves_the_origin_alone(pretrained):
    _, model, _ = pretrained
    longer = dataclasses.replace(TOY, fine_tune_steps_per_class=4)
    made = {name: make_task(name, size=120) for name in ("shapes", "colours")}
    heads = head_weights(made.values())
    before = {name: t.clone() for name, t in model.visual.state_dict().items()}
    seen = {name: [] for name in made}
    experts = training.fine_tune_all(
        model.visual, heads, made, longer, lambda name, step, steps, loss: seen[name].append(loss)
    )
    assert list(experts) == list(made)
    for name, losses in seen.items():
        assert len(losses) == 4 * len(made[name].class_names)
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
        alone = training.fine_tune_all(
            model.visual,
            {name: heads[name]},
            {name: made[name]},
            dataclasses.replace(longer, threads=1),
        )[name]
        assert list(alone) == list(before)
        assert all(torch.equal(alone[key], t) for key, t in experts[name].items())
    assert all(torch.equal(before[key], t) for key, t in model.visual.state_dict().items())


def test_training_puts_torchs_settings_back(pretrained):
    _, model, _ = pretrained
    made = {"digits": make_task("digits", size=20)}
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        training.fine_tune_all(model.visual, head_weights(made.values()), made, TOY)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cuda.flash_sdp_enabled()


def test_an_experts_error_comes_out_of_fine_tune_all(pretrained):
    _, model, _ = pretrained
    made = {name: make_task(name, size=20) for name in ("digits", "shapes")}
    heads = head_weights(made.values())
    with pytest.raises(
        ValueError, match=r"head_weight for shapes must be \(10, D\), got \(9, 128\)"
    ):
        training.fine_tune_all(model.visual, {**heads, "shapes": heads["shapes"][:9]}, made, TOY)
    with pytest.raises(ValueError, match="same names"):
        training.fine_tune_all(model.visual, {"digits": heads["digits"]}, made, TOY)


def test_batches_show_every_image_before_any_twice():
    generator = torch.Generator().manual_seed(0)
    order = torch.cat(list(training._batches(10, 4, 5, generator)))
    assert sorted(order[:10].tolist()) == sorted(order[10:].tolist()) == list(range(10))
