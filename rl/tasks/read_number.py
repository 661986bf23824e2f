"""Read a number off a picture: a first task for images in prompts (docs/vision.md)."""

from __future__ import annotations

import random
from typing import Literal, get_args

import numpy as np

from rl.tasks.base import Example
from rl.tasks.drawn import DrawnTask
from rl.tasks.records import read_records

# Five rows of three columns for each digit.
_GLYPHS = (
    "###/# #/# #/# #/###", " # /## / # / # /###", "###/  #/###/#  /###", "###/  #/###/  #/###", "# #/# #/###/  #/  #",
    "###/#  /###/  #/###", "###/#  /###/# #/###", "###/  #/  #/  #/  #", "###/# #/###/# #/###", "###/# #/###/  #/###",
)  # fmt: skip

Shown = Literal["own", "shuffled", "none"]


class ReadNumberTask(DrawnTask):
    """Prompt `<image>no.` with a picture of a number, 100 to 999, answer `347`. Judged by `math_answer`.

    The picture is 24 x 24 pixels of grey noise, three bands of three cells of 8 x 8. The middle band has the number, a
    digit of 6 x 5 pixels in each cell, at one of 4 places there. Which numbers are trained on depends on the number
    alone: held-out numbers were never seen.
    """

    reward = "math_answer"
    grid = None
    alphabet = "0123456789no."

    def __init__(self, images: Shown = "own", noise: int = 50):
        """
        Args:
            images: "own" shows a row's own number, "shuffled" another one's, "none" noise alone: an accuracy that does
                not fall then does not come from pixels.
            noise: every pixel is brighter or darker by up to this, of 255.
        """
        if images not in get_args(Shown):
            raise ValueError(f"task.params.images must be one of {', '.join(get_args(Shown))}, got {images!r}")
        if not 0 <= noise <= 255:
            raise ValueError(f"task.params.noise must be 0 to 255, got {noise}")
        self.images, self.noise = images, noise

    def file_examples(self, path: str) -> list[Example]:
        """Rows of any file with the columns `prompt`, `image` (the path of one) and `answer`."""
        records = read_records(path)
        for column in ("prompt", "image", "answer"):
            if column not in records[0]:
                raise ValueError(f"{path} has no column {column!r}; it has {', '.join(records[0])}")
        return [dict(record) for record in records]

    def _propose(self, rng: random.Random) -> tuple[str, str]:
        number = str(rng.randrange(100, 1000))
        return number, number

    def _shown(self, problem: str, rng: random.Random) -> Example:
        number = str(rng.randrange(100, 1000)) if self.images == "shuffled" else problem
        return {"prompt": "<image>no.", "image": self._picture(number, rng), "answer": problem}

    def _picture(self, number: str, rng: random.Random) -> list[list[int]]:
        """Pixels [24, 24], 0 to 255: lists, so that a row is plain JSON."""
        pixels = np.full((24, 24), 55)
        top, left = 9 + rng.randrange(2), rng.randrange(2)
        for place, digit in enumerate("" if self.images == "none" else number):
            ink = np.array([[cell == "#" for cell in row] for row in _GLYPHS[int(digit)].split("/")])
            at = (slice(top, top + 5), slice(left + 8 * place, left + 8 * place + 6))
            pixels[at] += 145 * ink.repeat(2, 1)
        noise = np.random.default_rng(rng.getrandbits(63)).integers(-self.noise, self.noise + 1, pixels.shape)
        return (pixels + noise).clip(0, 255).tolist()

    def _draw(self, key: str, count: int, split: str, distinct: bool = False) -> list[Example]:
        """A split has few numbers (some 56 are held out), and any number of pictures of each."""
        return super()._draw(key, count, split)
