"""Heads: the formula, what is refused, and CLIP's zero-shot head against a plain loop."""

import numpy as np
import open_clip
import pytest
import torch

from neulig_fast import testing
from neulig_fast.neulig.heads import Head, zero_shot_head

TEMPLATES = ["a photo of a {}.", lambda name: f"the {name}, blurry"]
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8,
    },
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return open_clip.CLIP(**CONFIG).train()


@pytest.fixture(scope="module")
def tokenizer():
    return open_clip.SimpleTokenizer(context_length=16)


# -- Head ------------------------------------------------------------------------------------------


def test_logits_are_cosines_times_the_norm_of_the_row():
    head = Head(torch.tensor([[3.0, 0.0], [0.0, 5.0]]), torch.tensor([0.5, -1.0]))
    assert head(torch.tensor([[8.0, 0.0]])).tolist() == [[3.5, -1.0]]
    features = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    logits = head(features)
    assert torch.equal(logits[0], logits[1])  # the length of a feature does not matter
    plain = Head(head.weight, head.bias, normalize=False)
    assert plain(features)[0].tolist() == [9.5, 19.0]


def test_norm_has_no_epsilon():
    head = Head(torch.eye(2))
    assert head(torch.tensor([1e-15, 0.0])).tolist() == [1.0, 0.0]
    assert head(torch.zeros(2)).isnan().all()


def test_any_leading_shape_and_a_half_precision_feature():
    head = Head(torch.randn(3, 4))
    assert head(torch.randn(2, 5, 4)).shape == (2, 5, 3)
    assert head(torch.randn(2, 4).bfloat16()).dtype == torch.float32


def test_to_is_the_head_itself_where_nothing_changes():
    head = Head(torch.randn(3, 4), torch.randn(3))
    assert head.to("cpu", torch.float32) is head
    moved = head.to("cpu", torch.float64)
    assert moved.weight.dtype == moved.bias.dtype == torch.float64
    assert (
        not Head(torch.nn.Parameter(torch.ones(1, 1))).to("cpu", torch.float32).weight.requires_grad
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.randn(4),), r"weight must be \(C, D\)"),
        ((torch.randn(0, 4),), r"weight must be \(C, D\)"),
        ((torch.randn(3, 4), torch.randn(4)), r"bias must be \(C,\) = \(3,\), got \(4,\)"),
        ((torch.ones(3, 4, dtype=torch.int64),), "weight must be a float tensor"),
        ((torch.tensor([[float("inf")]]),), "weight holds values that are not finite"),
        ((torch.randn(1, 1), torch.tensor([float("nan")])), "bias holds values"),
    ],
)
def test_heads_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=f"Head: {message}"):
        Head(*arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((np.ones((2, 6)),), "weight must be a tensor, got ndarray"),
        ((torch.ones(2, 6), [0.0, 1.0]), "bias must be a tensor, got list"),
        ((None,), "weight must be a tensor, got NoneType"),
    ],
)
def test_heads_of_what_is_no_tensor(arguments, message):
    with pytest.raises(TypeError, match=f"Head: {message}"):
        Head(*arguments)


def test_heads_that_compute_the_same():
    weight, bias = torch.randn(3, 4), torch.randn(3)
    heads = [Head(weight), Head(weight, bias), Head(weight, bias, False), Head(weight + 1, bias)]
    heads += [Head(weight, bias + 1), Head(weight[:1], bias[:1])]
    for i, head in enumerate(heads):
        copy = Head(head.weight.clone(), None if i == 0 else head.bias.clone(), head.normalize)
        assert [head.same_as(other) for other in heads] == [i == k for k in range(len(heads))]
        assert head.same_as(copy)


def test_features_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"features must be \(..., 4\), got \(2, 5\)"):
        Head(torch.randn(3, 4))(torch.randn(2, 5))


# -- zero_shot_head --------------------------------------------------------------------------------


@torch.no_grad()
def one_by_one(clip, tokenizer, names):
    """The definition, one text at a time, in float64."""
    rows = []
    for name in names:
        texts = [TEMPLATES[0].replace("{}", name), TEMPLATES[1](name)]
        embeddings = [clip.encode_text(tokenizer([text]))[0].double() for text in texts]
        mean = sum(z / z.norm() for z in embeddings) / len(embeddings)
        rows.append(mean / mean.norm() * clip.logit_scale.double().exp())
    return torch.stack(rows)


@pytest.mark.parametrize("count", [1, 3, 150], ids=lambda n: f"{n} classes")
def test_head_of_any_number_of_classes(clip, tokenizer, count):
    names = [f"thing number {k}" for k in range(count)]
    head = zero_shot_head(clip, tokenizer, names, TEMPLATES)
    assert head.weight.shape == (count, 16) and head.weight.dtype == torch.float32
    assert head.bias is None and head.normalize
    oracle = one_by_one(clip.eval(), tokenizer, names)
    testing.assert_within_rule(head.weight, oracle.float(), oracle, terms=16)
    scale = clip.logit_scale.exp().expand(count).detach()
    testing.assert_within_rule(head.weight.norm(dim=1), scale, scale.double(), terms=16)


def test_the_model_runs_in_eval_mode_without_gradient_and_gets_its_mode_back(clip, tokenizer):
    seen = []
    parts = [part for part in clip.modules() if part is not clip]  # forward is encode_text here
    handles = [p.register_forward_hook(lambda m, x, y: seen.append(m.training)) for p in parts]
    clip.train()
    clip.visual.eval()
    clip.transformer.resblocks[1].eval()
    before = [part.training for part in clip.modules()]
    head = zero_shot_head(clip, tokenizer, ["cat"], TEMPLATES)
    for handle in handles:
        handle.remove()
    clip_modes = [part.training for part in clip.modules()]
    clip.train()
    assert seen and not any(seen) and not head.weight.requires_grad
    assert clip_modes == before and {True, False} <= set(before)


def test_names_with_braces_stay_text(clip):
    seen = []

    def tokenizer(texts):
        seen.extend(texts)
        return torch.ones(len(texts), 16, dtype=torch.int64)

    zero_shot_head(clip, tokenizer, ["{0.__class__}"], ["a {}", "the {} and {}"])
    assert seen == ["a {0.__class__}", "the {0.__class__} and {0.__class__}"]


@pytest.mark.parametrize(
    "names, templates, message",
    [
        ([], TEMPLATES, "class_names must be a non-empty sequence"),
        ("cat", TEMPLATES, "class_names must be a non-empty sequence"),
        (["cat"], [], "templates must be a non-empty sequence"),
        (["cat"], "a {}", "templates must be a non-empty sequence"),
        (["cat"], ["a photo"], r"templates\[0\] must contain \{\}"),
        ([3], TEMPLATES, r"class_names\[0\] must be a string, got 3"),
    ],
)
def test_what_makes_no_head_is_named(clip, tokenizer, names, templates, message):
    with pytest.raises(TypeError, match=message):
        zero_shot_head(clip, tokenizer, names, templates)
