"""What a group of experts is worth before and after alignment, merged in every way.

Accuracies are of two kinds. *Joint*: the argmax over the classes of all experts together. *Own*:
the argmax among the classes of the image's own task. Both are means over the experts' test sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import alignment as nf_alignment
from ..alignment import Aligner, Alignment
from ..alignment.repair import reestimate_batchnorm, rescale
from ..encoders.merged_rows import batchnorms
from ..encoders.template import evaluating, run
from ..neulig import Head, NeuLig
from ..pool import ExpertPool
from .origins import Group, OriginSettings, Output, build, draw
from .settings import derived_seed
from .tasks import normalise

State = Mapping[str, Tensor]
Predictor = Callable[[Tensor, int], Tensor]  # images, of which expert's test set -> logits (B, C)
PENALTIES = {"offset_sum": "published", "variance": "default"}
MODES = ("per_sample", "dataset")
_BATCH = 128


class Score(NamedTuple):
    """Mean accuracies over the experts' test sets, %; see the module's first lines."""

    own: float
    joint: float


class Part(NamedTuple):
    """The images of one expert, labelled among all classes of the group: images normalised."""

    images: Tensor
    labels: Tensor


@dataclass
class Trial:
    """Experts of different origin, with the images they are calibrated and tested on.

    Attributes:
        template: runs them. experts: state dicts as trained.
        head: text embeddings of all classes; expert i knows rows ``starts[i]`` to ``starts[i+1]``.
        calibration, test: per expert.
        mixed: batches of all experts' calibration images, shuffled.
    """

    names: tuple[str, ...]
    template: nn.Module
    experts: list[State]
    head: Head
    starts: list[int]
    calibration: list[Part]
    test: list[Part]
    mixed: list[Tensor] = field(repr=False)

    @torch.no_grad()
    def logits(self, state: State, images: Tensor) -> Tensor:
        """(B, C) of one network."""
        with evaluating(self.template):
            return self.head(run(self.template, state, images))

    @torch.no_grad()
    def score(self, predict: Predictor, parts: Sequence[Part]) -> Score:
        """Accuracy of whatever gives logits."""
        own, joint = [], []
        for i, part in enumerate(parts):
            chunks = part.images.split(_BATCH)
            logits = torch.cat([predict(images, i) for images in chunks])
            start, stop = self.starts[i : i + 2]
            joint.append((logits.argmax(-1) == part.labels).float().mean())
            inside = logits[:, start:stop].argmax(-1) + start
            own.append((inside == part.labels).float().mean())
        return Score(*(100 * torch.stack(each).mean().item() for each in (own, joint)))

    def of(self, state: State) -> Score:
        """Test accuracy of one merged network, its BatchNorm re-estimated."""
        fitting = reestimate_batchnorm(state, self.template, self.mixed)
        return self.score(lambda images, _: self.logits(fitting, images), self.test)

    def calibrated(self, state: State) -> float:
        """Joint accuracy of a merged network on the calibration images."""
        fitting = reestimate_batchnorm(state, self.template, self.mixed)
        return self.score(lambda images, _: self.logits(fitting, images), self.calibration).joint

    @torch.no_grad()
    def loss(self, state: State) -> float:
        """Mean cross-entropy over all classes on the test sets, BatchNorm re-estimated."""
        fitting = reestimate_batchnorm(state, self.template, self.mixed)
        losses = [
            F.cross_entropy(self.logits(fitting, part.images), part.labels) for part in self.test
        ]
        return torch.stack(losses).mean().item()


def make_trial(
    group: Group, experts: Sequence[State], output: Output, settings: OriginSettings
) -> Trial:
    """Experts of a group with their images."""
    heads = [member.head(output.weights) for member in group.members]
    starts = [0, *torch.tensor([len(head) for head in heads]).cumsum(0).tolist()]
    parts: dict[str, list[Part]] = {"train": [], "test": []}
    for split, found in parts.items():
        for member, start in zip(group.members, starts, strict=False):
            data = draw(member, settings, split)
            count = settings.calibration if split == "train" else len(data.labels)
            images, labels = normalise(data.images[:count]), data.labels[:count] + start
            found.append(Part(images, labels))
    images = torch.cat([part.images for part in parts["train"]])
    generator = torch.Generator().manual_seed(derived_seed(settings.demo.seed, 7))
    mixed = list(images[torch.randperm(len(images), generator=generator)].split(_BATCH))
    template = build(group.architecture, settings, heads[0].shape[1])
    return Trial(
        names=tuple(member.title for member in group.members),
        template=template,
        experts=list(experts),
        head=Head(torch.cat(heads)),
        starts=starts,
        calibration=parts["train"],
        test=parts["test"],
        mixed=mixed,
    )


class Alignments(NamedTuple):
    """One of each kind, and the calibration accuracy of every balance tried."""

    weights: Alignment  # Git Re-Basin
    activations: Alignment
    zipped: Alignment  # ZipIt
    dual: Alignment  # MuDSC
    dual_zip: Alignment
    scores: dict[str, dict[float, float]]
    similarity: Mapping[str, Mapping[Any, Tensor]]  # of activations, per node and pair


def make_alignments(trial: Trial, settings: OriginSettings) -> Alignments:
    """Match the experts in weight space, in activation space and in both."""
    spec = nf_alignment.spec_for(trial.template)

    def aligner(**options: Any) -> Aligner:
        return Aligner(trial.experts, spec, template=trial.template, **options)

    weights = aligner(similarity="inner_product").align(1.0)
    orders, zips = aligner(data=trial.mixed), aligner(data=trial.mixed, match="zip")
    activations, zipped = orders.align(0.0), zips.align(0.0)
    dual, scores = orders.choose_balance(trial.calibrated, settings.balances)
    dual_zip, zip_scores = zips.choose_balance(trial.calibrated, settings.balances)
    pairs = [(0, i) for i in range(len(trial.experts))]
    return Alignments(
        weights, activations, zipped, dual, dual_zip,
        {"align": scores, "zip": zip_scores}, orders.activations(pairs),
    )  # fmt: skip


def merged_rows(trial: Trial, found: Alignments) -> Iterator[tuple[str, Score]]:
    """Every way to one network, after the experts themselves and their ensemble."""
    own = trial.score(lambda images, i: trial.logits(trial.experts[i], images), trial.test)
    yield "each task's own expert", own
    if batchnorms(trial.template):
        yield "own expert, BatchNorm re-estimated", _reset(trial)
    together = trial.score(lambda images, _: ensemble(trial, images), trial.test)
    yield "ensemble of all experts", together
    uniform = ExpertPool(trial.experts, template=trial.template)
    yield "uniform average", trial.of(uniform.blend(_even(len(trial.experts))))
    yield "weights aligned (Git Re-Basin)", trial.of(found.weights.merge())
    yield "activations aligned", trial.of(found.activations.merge())
    yield "activations zipped (ZipIt)", trial.of(found.zipped.merge())
    yield "both aligned (MuDSC)", trial.of(found.dual.merge())
    yield "both zipped (MuDSC)", trial.of(found.dual_zip.merge())
    if not batchnorms(trial.template):
        yield "both aligned (MuDSC), REPAIR", trial.of(repaired(trial, found.dual))


def _reset(trial: Trial) -> Score:
    """The experts with statistics of all tasks' images, as the merged networks have them."""
    states = [reestimate_batchnorm(e, trial.template, trial.mixed) for e in trial.experts]
    return trial.score(lambda images, i: trial.logits(states[i], images), trial.test)


def ensemble(trial: Trial, images: Tensor) -> Tensor:
    """Log-probabilities (B, C): every expert's softmax over its own classes, side by side."""
    own = []
    for i, expert in enumerate(trial.experts):
        start, stop = trial.starts[i : i + 2]
        own.append(trial.logits(expert, images)[:, start:stop].log_softmax(-1))
    return torch.cat(own, -1)


def repaired(trial: Trial, aligned: Alignment) -> State:
    """The average with its activations rescaled to the experts' size."""
    experts = [aligned.apply(i) for i in range(aligned.num_networks)]
    return rescale(aligned.merge(), experts, trial.template, aligned.spec, trial.mixed)


def _even(count: int) -> Tensor:
    return torch.full((count,), 1 / count)


def neulig_rows(
    trial: Trial, aligned: Alignment, settings: OriginSettings
) -> Iterator[tuple[str, Score, float]]:
    """NeuLig on the experts as they are and as aligned; the last entry is the CoopVecs' mean max.

    An order that leaves two experts apart leaves their alignment term as it is, and with it the
    CoopVecs, up to rounding: only the merged parameters differ.
    """
    pools = {
        "unaligned": ExpertPool(trial.experts, template=trial.template, names=trial.names),
        "aligned": aligned.pool(names=trial.names),
    }
    heads = dict.fromkeys(trial.names, trial.head)
    loaders = {
        name: list(zip(part.images.split(_BATCH), part.labels.split(_BATCH), strict=True))
        for name, part in zip(trial.names, trial.calibration, strict=True)
    }
    for penalty, words in PENALTIES.items():
        for origin, pool in pools.items():
            engine = NeuLig(pool, heads, alignment=penalty, seed=settings.demo.seed)
            engine.fit(loaders, epochs=settings.portland_epochs, progress=False)
            top = _top(engine, trial)
            if origin == "unaligned":
                score = trial.score(lambda x, _, e=engine: e.ensemble(x, trial.head), trial.test)
                yield f"NeuLig, {words}: ensemble", score, top
            for mode in MODES:
                yield f"NeuLig, {words}: {mode}, {origin}", _mode(trial, engine, mode, loaders), top


def _mode(trial: Trial, engine: NeuLig, mode: str, loaders: Mapping[str, Any]) -> Score:
    """Merged per image with BatchNorm's moments pooled, or per data set with them re-estimated."""
    if mode == "per_sample":
        policy = "mixture_moments"
        return trial.score(
            lambda x, _: engine.merged_forward(x, trial.head, mode, batchnorm=policy), trial.test
        )
    states = [
        engine.merge(mode, loader=loaders[name], batchnorm="re_estimate") for name in trial.names
    ]
    return trial.score(lambda x, i: trial.logits(states[i], x), trial.test)


def _top(engine: NeuLig, trial: Trial) -> float:
    """The mean over test images of the largest weight."""
    return torch.cat([engine.coopvec(part.images) for part in trial.test]).amax(-1).mean().item()
