"""Real 8x8 digits by class: an image model is asked for a digit, and a classifier says whether it drew it.

The supervised stage may learn from wrong labels, which leaves a model that draws well and obeys badly: the gap
that reinforcement learning on prompt alignment closes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from rewards.digits import CLASSES, digit_features, digits
from rl.tasks.base import Example


class DigitsTask:
    """Prompt "7", label 7; the supervised stage sees an image of the training half in column `image`."""

    modality = "images"
    reward = "digit_judge"
    grid = None
    alphabet = None
    classes: tuple[str, ...] = CLASSES

    def __init__(self, label_noise: float = 0.0, told: bool = True):
        """
        Args:
            label_noise: share of training images whose label is drawn at random (it may hit the right one).
            told: false has the one prompt "digit" for all of them, which leaves a model without conditions.
        """
        if not 0 <= label_noise <= 1:
            raise ValueError(f"task.params label_noise must be in [0, 1], got {label_noise}")
        self.label_noise, self.told = label_noise, told
        if not told:
            self.classes = ("digit",)

    def train_examples(self, seed: int, step: int, count: int) -> list[Example]:
        """Images drawn with replacement. An image keeps its wrong label: labels are noisy, not images."""
        images, labels = digits("train")
        rng = random.Random(f"train {seed} {step}")
        rows = []
        for _ in range(count):
            index = rng.randrange(len(images))
            own = random.Random(f"label {index}")
            wrong = own.random() < self.label_noise
            label = own.randrange(10) if wrong else int(labels[index])
            rows.append({"prompt": self._prompt(label), "label": label, "image": images[index]})
        return rows

    def validation_examples(self, count: int) -> list[Example]:
        return self.heldout_examples(count)

    def heldout_examples(self, count: int, seed: int = 0) -> list[Example]:
        """Every class equally often. What is held out is the judge, and the noise an image starts from."""
        return [{"prompt": self._prompt(i % 10), "label": i % 10} for i in range(count)]

    def _prompt(self, label: int) -> str:
        return CLASSES[label] if self.told else "digit"

    def file_examples(self, path: str) -> list[Example]:
        raise ValueError("the digits task has no file format: its images come with scikit-learn")

    def features(self, images: Sequence[Any]) -> np.ndarray:
        """float64 [N, D], what image sets are compared by."""
        return digit_features(images)

    def real_images(self) -> list[np.ndarray]:
        """Images that neither the model nor its reward has seen."""
        return list(digits("judge")[0])
