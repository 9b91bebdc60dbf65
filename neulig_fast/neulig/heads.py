"""Prediction heads: frozen linear classifiers on the ensembled or merged features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import raise_all, shape
from ..encoders.template import evaluating

_TEXTS_PER_CALL = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Head:
    """y = H z/‖z‖ + h, or y = H z + h without ``normalize``. The norm has no epsilon.

    Args:
        weight: H, (C, D) float. For CLIP it includes the factor exp(logit_scale).
        bias: h, (C,) float, or None for zero.
        normalize: divide the features by their L2 norm first.

    Raises:
        TypeError: weight or bias is not a tensor.
        ValueError: shapes or dtypes that do not fit, or values that are not finite; all of them
            named.
    """

    weight: Tensor
    bias: Tensor | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        raise_all("Head", self._strangers(), TypeError)
        raise_all("Head", self._faults())

    def _strangers(self) -> Iterator[str]:
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            if not isinstance(value, Tensor) and (name, value) != ("bias", None):
                yield f"{name} must be a tensor, got {type(value).__name__}"

    def _faults(self) -> Iterator[str]:
        if self.weight.ndim != 2 or 0 in self.weight.shape:
            yield f"weight must be (C, D) with C, D >= 1, got {shape(self.weight)}"
        elif self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            yield f"bias must be (C,) = ({self.num_classes},), got {shape(self.bias)}"
        for name, tensor in (("weight", self.weight), ("bias", self.bias)):
            if tensor is not None and not tensor.is_floating_point():
                yield f"{name} must be a float tensor, got {tensor.dtype}"
            elif tensor is not None and not tensor.isfinite().all():
                yield f"{name} holds values that are not finite"

    @property
    def num_classes(self) -> int:
        """C."""
        return self.weight.shape[0]

    @property
    def feature_dim(self) -> int:
        """D."""
        return self.weight.shape[1]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Head:
        """The head detached, on a device and in a dtype; itself where that changes nothing."""
        tensors = [t for t in (self.weight, self.bias) if t is not None]
        device = torch.device(device)
        if all(t.device == device and t.dtype == dtype and not t.requires_grad for t in tensors):
            return self
        bias = None if self.bias is None else self.bias.detach().to(device, dtype)
        return Head(self.weight.detach().to(device, dtype), bias, self.normalize)

    def same_as(self, other: Head) -> bool:
        """Whether both compute the same: equal shapes and values, on one device."""
        if self.normalize != other.normalize or (self.bias is None) != (other.bias is None):
            return False
        pairs = [(self.weight, other.weight), (self.bias, other.bias)]
        return all(mine is None or torch.equal(mine, theirs) for mine, theirs in pairs)

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (..., C) of features (..., D), in the dtype of the head.

        Raises:
            ValueError: the last dimension of ``features`` is not D.
        """
        if features.shape[-1] != self.feature_dim:
            raise ValueError(
                f"Head: features must be (..., {self.feature_dim}), got {shape(features)}"
            )
        z = features.to(self.weight.dtype)
        if self.normalize:
            z = z / torch.linalg.vector_norm(z, dim=-1, keepdim=True)
        return nn.functional.linear(z, self.weight, self.bias)


@torch.no_grad()
def zero_shot_head(
    clip_model: nn.Module,
    tokenizer: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    templates: Sequence[str | Callable[[str], str]],
) -> Head:
    """The text head of CLIP: one row per class, any number of classes, one included.

    For every class: encode every template's text with the text tower, normalise each embedding,
    average over templates, normalise the average, multiply by exp(logit_scale). NeuLig
    (arXiv 2503.01268); docs/neulig.md, 5.

    Args:
        clip_model: has ``encode_text`` and ``logit_scale``; runs in eval mode, in batches of 256
            texts, and every submodule gets its mode back.
        tokenizer: list of texts -> (texts, context) token ids.
        class_names: C names.
        templates: texts with ``{}`` for the name, or functions of the name.

    Returns:
        A head with weight (C, D) fp32, no bias, ``normalize=True``.

    Raises:
        ValueError, TypeError: no class, no template, a template without ``{}``, all of them named.
    """
    raise_all("zero_shot_head", _text_faults(class_names, templates), TypeError)
    texts = [_fill(template, name) for name in class_names for template in templates]
    embeddings = _encode_texts(clip_model, tokenizer, texts)
    rows = nn.functional.normalize(embeddings, dim=1).view(len(class_names), len(templates), -1)
    rows = nn.functional.normalize(rows.mean(1), dim=1)
    return Head(rows * clip_model.logit_scale.detach().float().exp())


def _text_faults(class_names: Any, templates: Any) -> Iterator[str]:
    for name, values in (("class_names", class_names), ("templates", templates)):
        if isinstance(values, str) or len(values) == 0:
            yield f"{name} must be a non-empty sequence, got {values!r}"
    if isinstance(class_names, str) or isinstance(templates, str):
        return
    for k, name in enumerate(class_names):
        if not isinstance(name, str):
            yield f"class_names[{k}] must be a string, got {name!r}"
    for k, template in enumerate(templates):
        if not callable(template) and not (isinstance(template, str) and "{}" in template):
            yield f"templates[{k}] must contain {{}} or be a function of the name, got {template!r}"


def _fill(template: str | Callable[[str], str], name: str) -> str:
    # replace, not format: a template may come from a file, and format reaches into attributes.
    return template.replace("{}", name) if isinstance(template, str) else template(name)


def _encode_texts(
    model: nn.Module, tokenizer: Callable[[list[str]], Tensor], texts: list[str]
) -> Tensor:
    device = model.logit_scale.device
    with evaluating(model):
        batches = [
            model.encode_text(tokenizer(texts[k : k + _TEXTS_PER_CALL]).to(device)).float()
            for k in range(0, len(texts), _TEXTS_PER_CALL)
        ]
    return torch.cat(batches)
