"""How much of a wanted text an image shows, read by RapidOCR's recognition network, whose weights come in its wheel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rewards.image import to_pil
from rewards.score import Score
from rewards.text import text_of


class Ocr:
    """Edit similarity of the text that is read and the text that is wanted: 1 - edit distance / length of the longer.

    The whole image is read as one line of text, enlarged to `height` pixels; nothing looks for text in it. Metrics:
    `exact` (1 where both are equal) and `confidence` (the network's own). The text-rendering reward of Flow-GRPO
    (arXiv 2505.05470, section 4) is the same similarity with another reader. Needs `pip install 'denoise-rl[ocr]'`.

    Example: "cat" wanted and "car" read: 1 - 1/3.

    Args:
        ignore_case: compare lower case, without spaces.
        height: pixels that an image is enlarged to before it is read; the network scales its input to 48.
        width: pixels that a line of that height of 48 is padded to; short words are read faster with fewer.

    A row's wanted text is its column `text`, or its prompt where there is no such column.

    Raises:
        ValueError: the package rapidocr-onnxruntime is missing.
    """

    def __init__(self, ignore_case: bool = True, height: int = 96, width: int = 320) -> None:
        try:
            from rapidocr_onnxruntime import RapidOCR
        except ImportError:
            raise ValueError(
                "reward 'ocr' reads with the package rapidocr-onnxruntime: pip install 'denoise-rl[ocr]'"
            ) from None
        self.reader = RapidOCR(rec_img_shape=[3, 48, width])
        self.ignore_case, self.height = ignore_case, height
        self.__name__ = "ocr"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        wanted = columns.get("text") or [text_of(prompt) for prompt in prompts]
        scores = []
        for image, text in zip(completions, wanted, strict=True):
            found, confidence = self.read(image)
            one, other = self._compared(found), self._compared(str(text))
            value = similarity(one, other)
            scores.append(Score(value, metrics={"exact": float(one == other), "confidence": confidence}))
        return scores

    def read(self, image: Any) -> tuple[str, float]:
        """The line of text in an image, "" where none is seen, and how sure the network is of it."""
        picture = to_pil(image).convert("RGB")
        width = max(1, round(picture.width * self.height / picture.height))
        pixels = np.asarray(picture.resize((width, self.height)))[:, :, ::-1]
        found, _ = self.reader(np.ascontiguousarray(pixels), use_det=False, use_cls=False, use_rec=True)
        text, confidence = found[0] if found else ("", 0.0)
        return str(text), float(confidence)

    def _compared(self, text: str) -> str:
        return "".join(text.lower().split()) if self.ignore_case else text


def similarity(one: str, other: str) -> float:
    """1 - Levenshtein distance / length of the longer text; 1 for two empty ones."""
    before = list(range(len(other) + 1))
    for i, letter in enumerate(one, start=1):
        row = [i]
        for j, theirs in enumerate(other, start=1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (letter != theirs)))
        before = row
    return 1 - before[-1] / max(len(one), len(other), 1)
