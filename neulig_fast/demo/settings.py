"""Every number of the demo in one frozen place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def derived_seed(seed: int, *purpose: int) -> int:
    """A seed of its own for each purpose, the same in every process."""
    return int(np.random.SeedSequence((seed, *purpose)).generate_state(1)[0])


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and rates of the demo, chosen on the validation splits."""

    seed: int = 0
    threads: int = 2  # no result depends on it
    # Model: one image tower of `layers` blocks of `width` channels; patches are 8x8.
    width: int = 128
    layers: int = 4
    # Data. Images per class where classes differ in number, images per task elsewhere.
    plain_per_class: int = 160
    train_per_class: int = 400
    test_size: int = 500
    # Contrastive pre-training on the plain style.
    pretrain_steps: int = 320
    pretrain_batch: int = 192
    pretrain_lr: float = 1e-3
    pretrain_matrix_lr: float = 0.02
    # Fine-tuning on each domain, a fixed number of steps per class: every expert sees each class
    # equally often, and the five jobs share out evenly over two threads.
    fine_tune_steps_per_class: int = 20
    fine_tune_batch: int = 64
    fine_tune_lr: float = 1e-3
    fine_tune_matrix_lr: float = 0.006
    # The Portland, on the features of some of each task's training images.
    portland_images: int = 2000
    portland_epochs: int = 100

    @classmethod
    def toy(cls) -> DemoSettings:
        """The same pipeline in a second or two, for tests; it learns little."""
        return cls(
            width=32,
            layers=2,
            plain_per_class=8,
            train_per_class=8,
            test_size=52,
            pretrain_steps=40,
            pretrain_batch=64,
            pretrain_lr=5e-3,
            pretrain_matrix_lr=0.05,
            fine_tune_steps_per_class=2,
            fine_tune_batch=32,
            fine_tune_lr=5e-3,
            fine_tune_matrix_lr=0.05,
            portland_images=64,
            portland_epochs=5,
        )
