"""open_clip models and checkpoints of them: what a run needs to know before and after loading."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn

from ._checks import did_you_mean, one_line_each, raise_all, shape
from .outputs import VISUAL
from .state_files import read_state_dict

# What open_clip raises on a config file whose values do not make a model.
_UNBUILDABLE = (TypeError, ValueError, KeyError, AttributeError, RuntimeError, AssertionError)
_CONFIG_KEYS = ("embed_dim", "vision_cfg", "text_cfg")
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")
_NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # in OpenAI's checkpoints
_SHOWN = 3  # keys of a foreign checkpoint


@dataclasses.dataclass(frozen=True)
class ClipModel:
    """An open_clip model with its weights and what belongs to it.

    Attributes:
        name: by which open_clip creates it.
        config: its JSON file, None for a stock model.
        module: eval mode, fp32; on the CPU until moved.
        tokenizer: texts -> token ids.
        preprocess_changes: preprocessing, of the user or of a pretrained tag, that open_clip
            would not choose by the model's name alone.
    """

    name: str
    config: Path | None
    module: nn.Module
    tokenizer: Callable[[list[str]], Tensor]
    preprocess_changes: Mapping[str, Any]

    @property
    def state_dict(self) -> dict[str, Tensor]:
        """Of the whole model."""
        return self.module.state_dict()

    def transform(self, augment: bool = False) -> Callable[..., Tensor]:
        """open_clip's evaluation transform (deterministic), or its training transform."""
        return transform_of(self.module, augment)


def transform_of(module: nn.Module, augment: bool = False) -> Callable[..., Tensor]:
    """See :meth:`ClipModel.transform`."""
    settings = PreprocessCfg(**module.visual.preprocess_cfg)
    return image_transform_v2(settings, is_train=augment)


def clip_faults(model: str, pretrained: str | None) -> Iterator[str]:
    """What is wrong with a model's name or config file, and with a pretrained tag or file."""
    if model.endswith(".json"):
        fault = _config_fault(Path(model))
        if fault:
            yield f"model: {fault}"
            return
    elif model not in open_clip.list_models():
        hint = did_you_mean(model, open_clip.list_models())
        yield f"model: open_clip has no model {model!r}, and it is no .json file{hint}"
        return
    if pretrained is None or Path(pretrained).is_file():
        return
    tags = [] if model.endswith(".json") else open_clip.list_pretrained_tags_by_model(model)
    if pretrained not in tags:
        known = f"tags of {model}: {', '.join(tags)}" if tags else f"{model} has no tags"
        hint = did_you_mean(pretrained, tags)
        yield f"pretrained: {pretrained!r} is neither a file nor a tag ({known}){hint}"


def _config_fault(path: Path) -> str | None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return f"{path} is not JSON ({error})"
    missing = [key for key in _CONFIG_KEYS if not isinstance(config, dict) or key not in config]
    return f"{path} is no open_clip config: it lacks {', '.join(missing)}" if missing else None


class Expert(NamedTuple):
    """A checkpoint's tensors: the image tower, names without ``prefix``, and all others."""

    visual: dict[str, Tensor]
    rest: dict[str, Tensor]
    prefix: str = ""

    def with_visual(self, visual: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint with another image tower, in the dtypes of its own."""
        named = {self.prefix + k: v.to(self.visual[k].dtype) for k, v in visual.items()}
        return {**self.rest, **named}


def read_expert(path: str | Path) -> Expert:
    """Read a checkpoint of a whole CLIP or of an image tower alone.

    Raises:
        OSError, ValueError: see :func:`~neulig_fast.state_files.read_state_dict`.
    """
    state = read_state_dict(path)
    visual = {k.removeprefix(VISUAL): v for k, v in state.items() if k.startswith(VISUAL)}
    if not visual:
        return Expert(state, {})
    return Expert(visual, {k: v for k, v in state.items() if not k.startswith(VISUAL)}, VISUAL)


def foreign(expert: Expert, template: nn.Module) -> str | None:
    """Why an expert is not at all of the template's kind, or None where names coincide."""
    known = template.state_dict()
    if any(name in known for name in expert.visual):
        return None
    keys, wanted = list(expert.visual)[:_SHOWN], list(known)[:_SHOWN]
    return (
        f"neither a CLIP state dict (names such as {VISUAL}{wanted[0]}) nor an image tower's "
        f"({', '.join(wanted)}, ...); its names are {', '.join(keys)}, ..."
    )


def common_text_tower(experts: Mapping[str, Expert]) -> dict[str, Tensor]:
    """The tensors besides the image tower that all experts share, for want of ``pretrained``.

    Raises:
        ValueError: an expert that is an image tower alone, or text towers that differ.
    """
    first, *others = experts
    tower = experts[first].rest
    alone = [name for name, expert in experts.items() if not expert.rest]
    faults = [f"expert {name!r} is an image tower without text tower" for name in alone]
    for name in others if not alone else ():
        rest = experts[name].rest
        differing = [k for k in (tower | rest) if not _same(tower.get(k), rest.get(k))]
        if differing:
            what = f"{differing[0]} and {len(differing) - 1} more tensors"
            faults.append(f"the text towers of {first!r} and {name!r} differ ({what})")
    if faults:
        faults = [f"is needed for the class names' embeddings: {'; '.join(faults)}"]
    raise_all("pretrained", faults)
    return tower


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def create(
    model: str, tag: str | None = None, preprocess: Mapping[str, Any] | None = None
) -> tuple[str, nn.Module]:
    """The name by which open_clip creates the model, and the model in eval mode.

    Args:
        tag: of pretrained weights; None leaves the weights random.
        preprocess: overrides open_clip's ``mean``, ``std``, ``interpolation``, ``resize_mode``.

    Raises:
        ValueError: a config that makes no model.
    """
    name = Path(model).stem if model.endswith(".json") else model
    if model.endswith(".json"):
        open_clip.add_model_config(Path(model))
    try:
        with _quiet():
            module = open_clip.create_model(name, tag, force_preprocess_cfg=dict(preprocess or {}))
    except (*_UNBUILDABLE, ImportError) as error:
        raise _unbuildable(model, error) from error
    return name, module.eval().requires_grad_(False)


def _unbuildable(model: str, error: Exception) -> ValueError:
    return ValueError(f"model: open_clip cannot build {model}: {error}")


def build_clip(
    model: str,
    pretrained: str | None,
    text_tower: Mapping[str, Tensor],
    preprocess: Mapping[str, Any],
) -> ClipModel:
    """Create the model with the weights of ``pretrained``, a tag or file.

    Args:
        text_tower: used when ``pretrained`` is None: every tensor but the image tower's.
        preprocess: as for :func:`create`.

    Raises:
        ValueError: a config that makes no model; weights that do not fit it, all mismatches.
    """
    tag = None if pretrained is None or Path(pretrained).is_file() else pretrained
    name, module = create(model, tag, preprocess)
    try:
        tokenizer = open_clip.get_tokenizer(name)
    except (*_UNBUILDABLE, ImportError) as error:
        raise _unbuildable(model, error) from error
    _check_vocabulary(module, tokenizer)
    if pretrained is None:
        visual = {f"{VISUAL}{k}": v for k, v in module.visual.state_dict().items()}
        _load(module, {**visual, **text_tower}, "the experts' text tower")
    elif tag is None:
        _load(module, read_state_dict(pretrained), f"pretrained: {pretrained}")
    used, plain = module.visual.preprocess_cfg, dataclasses.asdict(PreprocessCfg())
    changes = {k: used[k] for k in _PREPROCESS if _listed(used[k]) != _listed(plain[k])}
    config = Path(model) if model.endswith(".json") else None
    return ClipModel(name, config, module, tokenizer, changes)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's warning that a model starts from random weights: they come next."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _check_vocabulary(module: nn.Module, tokenizer: Any) -> None:
    embedding = getattr(module, "token_embedding", None)
    size = getattr(tokenizer, "vocab_size", None)
    if isinstance(embedding, nn.Embedding) and size and size > embedding.num_embeddings:
        raise ValueError(
            f"model: text_cfg.vocab_size is {embedding.num_embeddings}, but the tokenizer has "
            f"{size} tokens"
        )


def _load(module: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Copy a whole state dict into ``module``; every mismatch in one error."""
    wanted = module.state_dict()
    state = {name: tensor for name, tensor in state.items() if name not in _NO_WEIGHTS}
    if "logit_scale" in state and "logit_scale" in wanted:  # () or (1,), by version
        state["logit_scale"] = state["logit_scale"].reshape(wanted["logit_scale"].shape)
    if not any(name.startswith(VISUAL) for name in state):
        raise_all(source, [f"is no CLIP state dict: it has no tensors called {VISUAL}..."])
    faults = [("lacks ", name, "") for name in wanted if name not in state]
    faults += [("has ", name, ", which the model lacks") for name in state if name not in wanted]
    faults += [
        ("", name, f" has shape {shape(state[name])}, the model {shape(wanted[name])}")
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    raise_all(source, one_line_each(faults))
    module.load_state_dict(state)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
