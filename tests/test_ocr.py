"""The reward that reads text in images: the similarity by hand, and what is read of perfect words and of noise."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from rewards.load import load_reward
from rewards.ocr import Ocr, similarity

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def rendered(word: str, size: int = 32) -> Image.Image:
    """Black on white, with a margin."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(word)
    picture = Image.new("L", (int(right - left) + 16, int(bottom - top) + 16), 255)
    ImageDraw.Draw(picture).text((8 - left, 8 - top), word, fill=0, font=font)
    return picture


def test_edit_similarity() -> None:
    assert similarity("car", "cat") == pytest.approx(2 / 3)
    assert similarity("", "cat") == 0 and similarity("cat", "cat") == 1 and similarity("", "") == 1
    assert similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert similarity("ab", "ba") == 0
    # Whichever is the longer.
    assert similarity("catch", "cat") == similarity("cat", "catch") == pytest.approx(1 - 2 / 5)


@pytest.fixture(scope="module")
def ocr() -> Ocr:
    pytest.importorskip("rapidocr_onnxruntime")
    return Ocr()


def test_perfect_words_are_read_and_noise_is_not(ocr: Ocr) -> None:
    """`docs/image_rewards.md` has the figures of 200 words."""
    draw = random.Random(0)
    words = ["".join(draw.choices(LETTERS, k=draw.choice((3, 4)))) for _ in range(40)]
    scores = ocr(words, [rendered(word) for word in words])
    assert np.mean([score.value for score in scores]) >= 0.95
    assert ocr(["other words"], [rendered("cat")], text=["cat"])[0].metrics["exact"] == 1
    noise = np.random.default_rng(0).integers(0, 256, (10, 32, 96), dtype=np.uint8)
    assert np.mean([score.value for score in ocr(words[:10], list(noise))]) < 0.1


def test_case_counts_when_asked(ocr: Ocr) -> None:
    picture = rendered("CAT")
    assert ocr(["cat"], [picture])[0].value == 1
    strict = Ocr(ignore_case=False)
    assert strict(["cat"], [picture])[0].value == 0 and strict(["CAT"], [picture])[0].value == 1


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rapidocr_onnxruntime", None)
    with pytest.raises(ValueError, match=r"pip install 'denoise-rl\[ocr\]'"):
        load_reward("ocr", {})
