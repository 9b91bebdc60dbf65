"""Image models by name, to run checkpoints with: open_clip's image towers, and timm's models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import timm
from PIL import Image
from torch import nn
from torchvision.transforms import Compose

from . import clip_models
from ._checks import did_you_mean
from .clip_models import Expert
from .image_folder import Transform
from .outputs import loading_code
from .state_files import read_state_dict

_TIMM = "timm/"  # before the name of a model of timm's
_SHOWN = 3  # names of a foreign checkpoint


class ImageModel(NamedTuple):
    """The code of an image model.

    Attributes:
        module: eval mode, random weights, on the CPU until moved.
        transform: from a PIL image, deterministic, as the library prepares images for the model.
        loading_code: the Python that loads a file like the checkpoint it was built for.
    """

    module: nn.Module
    transform: Transform
    loading_code: Callable[[Path], str]


class Library(NamedTuple):
    """What is known of a library's models.

    Attributes:
        faults: what is wrong with a model's name or config file.
        read: a checkpoint; raises OSError or ValueError.
        build: the model that an expert is a checkpoint of; raises ValueError.
        foreign: why an expert is not at all of the module's kind, or None.
    """

    faults: Callable[[str], Iterator[str]]
    read: Callable[[Path], Expert]
    build: Callable[[str, Expert], ImageModel]
    foreign: Callable[[Expert, nn.Module], str | None]


def library_of(model: str) -> Library:
    """timm for ``timm/NAME``; else open_clip, by name or by the path of a ``.json`` config."""
    return TIMM if model.startswith(_TIMM) else OPEN_CLIP


# -- open_clip ---------------------------------------------------------------------------------


def _clip_faults(model: str) -> Iterator[str]:
    return clip_models.clip_faults(model, None)


def _build_clip(model: str, expert: Expert) -> ImageModel:
    name, module = clip_models.create(model)
    config = Path(model) if model.endswith(".json") else None

    def code(path: Path) -> str:
        if expert.rest:
            return loading_code(path, name, config)
        created, _, call = loading_code(path, name, config).rpartition("\n")
        call = call.partition(", pretrained=")[0] + ")"
        load = f"safetensors.torch.load_file({str(path)!r})"
        return f"{created}\nimport safetensors.torch\n{call}\nmodel.visual.load_state_dict({load})"

    return ImageModel(module.visual, clip_models.transform_of(module), code)


OPEN_CLIP = Library(_clip_faults, clip_models.read_expert, _build_clip, clip_models.foreign)


# -- timm --------------------------------------------------------------------------------------


def _timm_faults(model: str) -> Iterator[str]:
    name = model.removeprefix(_TIMM)
    if not timm.is_model(name):
        yield f"model: timm has no model {name!r}{did_you_mean(name, timm.list_models())}"


def _read_timm(path: Path) -> Expert:
    return Expert(read_state_dict(path), {})


def _build_timm(model: str, expert: Expert) -> ImageModel:
    name = model.removeprefix(_TIMM)
    try:
        classes = _classes(name, expert)
        module = timm.create_model(name, num_classes=classes).eval().requires_grad_(False)
    except RuntimeError as error:  # an unknown pretrained tag after the name
        raise ValueError(f"model: timm cannot build {name}: {error}") from error
    settings = timm.data.resolve_model_data_config(module)
    transform = timm.data.create_transform(**settings, is_training=False)

    def code(path: Path) -> str:
        arguments = f"{name!r}, num_classes={classes}, checkpoint_path={str(path)!r}"
        return f"import timm\nmodel = timm.create_model({arguments})"

    return ImageModel(module, Compose([_in_colour, transform]), code)


def _classes(name: str, expert: Expert) -> int:
    """Outputs of the checkpoint's classifier; 0 for one without, which gives features."""
    settings = timm.get_pretrained_cfg(name)
    classifier = settings.classifier if settings else None
    first = classifier[0] if isinstance(classifier, tuple) else classifier
    weight = expert.visual.get(f"{first}.weight")
    return 0 if weight is None else len(weight)


def _in_colour(image: Image.Image) -> Image.Image:
    """open_clip's transforms do so themselves."""
    return image.convert("RGB")


def _foreign_timm(expert: Expert, module: nn.Module) -> str | None:
    known = module.state_dict()
    if any(name in known for name in expert.visual):
        return None
    keys, wanted = list(expert.visual)[:_SHOWN], list(known)[:_SHOWN]
    return f"no state dict of this model ({', '.join(wanted)}, ...): it has {', '.join(keys)}, ..."


TIMM = Library(_timm_faults, _read_timm, _build_timm, _foreign_timm)
