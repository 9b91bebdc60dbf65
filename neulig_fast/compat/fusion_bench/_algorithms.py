"""Our methods as FusionBench's: NeuLig and MuDSC on the models of a pool."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from fusion_bench import BaseAlgorithm, BaseModelPool, auto_register_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ...alignment import align
from ...neulig import Head, NeuLig


class _OnExperts(BaseAlgorithm):
    """A method that reads a pool's models, without the pretrained one."""

    batch_size: int

    def experts(self, modelpool: Any) -> tuple[BaseModelPool, dict[str, nn.Module]]:
        """The pool and its models by name."""
        pool = modelpool if isinstance(modelpool, BaseModelPool) else BaseModelPool(modelpool)
        return pool, {name: pool.load_model(name) for name in pool.model_names}

    def loader(self, pool: BaseModelPool, name: str) -> Iterable[Any]:
        """Batches of a model's training set, in its order."""
        return DataLoader(pool.load_train_dataset(name), batch_size=self.batch_size)


@auto_register_config
class NeuLigAlgorithm(_OnExperts):
    """NeuLig (arXiv 2503.01268): a Portland weighs the experts, and their weights are blended so.

    The pool's models map images to (B, D) features; each has a training set of its name.

    Args:
        heads: name -> (C, D) weights of the task's linear head, a tensor or a :class:`Head`, or
            the path of a file that ``torch.load`` reads such a dictionary from.
        task: whose merged model ``run`` returns; one of the names.
        epochs, lr, batch_size: of the fit.
        alignment, boosting, scaling, seed: of :class:`neulig_fast.NeuLig`.
    """

    def __init__(
        self, heads: Any, task: str, epochs: int = 100, lr: float = 1e-3, batch_size: int = 128,
        alignment: str = "variance", boosting: str = "supervised", scaling: float | None = None,
        seed: int = 0, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)

    def run(self, modelpool: Any) -> nn.Module:
        """The model merged for ``task``.

        Raises:
            ValueError: a task, heads or models that do not fit.
        """
        pool, experts = self.experts(modelpool)
        heads = _heads(self.heads)
        unknown = sorted({self.task, *heads} - experts.keys())
        if unknown:
            known = ", ".join(experts)
            raise ValueError(f"NeuLigAlgorithm: no model {', '.join(unknown)} in the pool: {known}")
        engine = NeuLig(
            experts.values(), heads, self.alignment, self.boosting, self.scaling, self.seed
        )
        loaders = {name: self.loader(pool, name) for name in heads}
        engine.fit(loaders, self.epochs, self.lr, self.batch_size)
        return _loaded(experts, engine.merge("dataset", task=self.task))


@auto_register_config
class MuDSCAlgorithm(_OnExperts):
    """MuDSC (arXiv 2403.01753): models of different origin, aligned and then averaged.

    Args:
        balance: the share of the weights' likeness; 1 needs no data.
        match: ``align`` or ``zip``.
        similarity, order, sweeps, seed: of :func:`neulig_fast.align`.
        batch_size: of the images that activations are made of, the pool's training sets.
    """

    def __init__(
        self, balance: float = 0.5, match: str = "align", similarity: str = "correlation",
        order: str = "colour", sweeps: int = 100, seed: int = 0, batch_size: int = 128,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(**kwargs)

    def run(self, modelpool: Any) -> nn.Module:
        """The average of the aligned models."""
        pool, experts = self.experts(modelpool)
        found = align(
            experts.values(), data=self._images(pool) if self.balance < 1 else None,
            balance=self.balance, match=self.match, seed=self.seed, similarity=self.similarity,
            order=self.order, sweeps=self.sweeps,
        )  # fmt: skip
        return _loaded(experts, found.merge())

    def _images(self, pool: BaseModelPool) -> Iterator[Any]:
        for name in pool.train_dataset_names:
            yield from self.loader(pool, name)


def _heads(given: Any) -> dict[str, Head]:
    heads = torch.load(given, weights_only=True) if isinstance(given, str) else given
    if not isinstance(heads, Mapping):
        kind = type(heads).__name__
        raise ValueError(f"NeuLigAlgorithm: heads must be a dictionary or a path, got {kind}")
    return {name: head if isinstance(head, Head) else Head(head) for name, head in heads.items()}


def _loaded(experts: Mapping[str, nn.Module], state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the first model with other tensors."""
    model = copy.deepcopy(next(iter(experts.values())))
    model.load_state_dict(state)
    return model
