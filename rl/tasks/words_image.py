"""Rendered words of 3 or 4 letters: an image model is asked for a word, and a text reader says what it wrote.

The supervised stage sees renderings in which letters are wrong, which leaves a model that writes well and misspells.
Every word belongs to one split, so held-out words are never seen; their letters are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rewards.image import to_array
from rl.tasks.base import Example
from rl.tasks.drawn import DrawnTask

# No two of them are taken for each other by the reader, as l and I are.
LETTERS = tuple("acdehinorstu")
HEIGHT, SLOT, PLACES = 16, 8, 4


class WordsImageTask(DrawnTask):
    """Prompt "chat"; the supervised stage sees an image of 16 x 32 grey pixels in column `image`."""

    modality = "images"
    reward = "ocr"
    grid = None
    alphabet = None
    classes = LETTERS

    def __init__(self, letter_noise: float = 0.0):
        """
        Args:
            letter_noise: share of the letters in training images that are drawn at random (they may hit the right one).
        """
        if not 0 <= letter_noise <= 1:
            raise ValueError(f"task.params letter_noise must be in [0, 1], got {letter_noise}")
        self.letter_noise = letter_noise

    def file_examples(self, path: str) -> list[Example]:
        raise ValueError("the task words_image has no file format: it renders its words")

    def features(self, images: Sequence[Any]) -> np.ndarray:
        """float64 [N, 512], what image sets are compared by: the pixels."""
        return np.stack([to_array(image).reshape(-1) / 255.0 for image in images])

    def real_images(self) -> list[np.ndarray]:
        """Correct renderings of held-out words."""
        return [rendered(row["prompt"]) for row in self.heldout_examples(500)]

    def _propose(self, rng: random.Random) -> tuple[str, str]:
        word = "".join(rng.choices(LETTERS, k=rng.choice((3, 4))))
        return word, word

    def _shown(self, problem: str, rng: random.Random) -> Example:
        written = "".join(rng.choice(LETTERS) if rng.random() < self.letter_noise else letter for letter in problem)
        return {"prompt": problem, "image": rendered(written)}

    def _used_up(self, found: int, count: int, split: str) -> None:
        raise ValueError(f"the task words_image has only {found} {split} words where {count} are asked for")


def rendered(word: str) -> np.ndarray:
    """uint8 [16, 32]: black on white, a slot of 8 pixels per letter, from the left."""
    picture = Image.new("L", (SLOT * PLACES, HEIGHT), 255)
    draw = ImageDraw.Draw(picture)
    for place, letter in enumerate(word):
        draw.text((place * SLOT + SLOT // 2, 12), letter, fill=0, font=_font(), anchor="ms")
    return np.asarray(picture)


@cache
def _font() -> Any:
    return ImageFont.load_default(13)
