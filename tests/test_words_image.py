"""Rendered words: what is held out, what is rendered wrongly, and the small transformer that is told letters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from rl.models.class_policy import ClassPolicy, new_policy
from rl.tasks.words_image import LETTERS, WordsImageTask, rendered

FLOW = {"name": "FlowMatchEulerDiscreteScheduler"}


def policy() -> ClassPolicy:
    return new_policy({"model_type": "word_denoiser", "width": 16, "num_layers": 2, "num_heads": 2}, FLOW, LETTERS, 0)


def test_held_out_words_are_never_shown_and_letters_are() -> None:
    task = WordsImageTask()
    trained = {row["prompt"] for step in range(20) for row in task.train_examples(0, step, 100)}
    held = {row["prompt"] for row in task.heldout_examples(300)}
    assert len(held) == 300 and not trained & held
    assert set("".join(trained)) == set(LETTERS) and {len(word) for word in trained} == {3, 4}


def test_a_rendering_shows_its_word_and_noise_changes_letters() -> None:
    assert rendered("cat").shape == (16, 32) and rendered("cat").dtype == np.uint8
    assert not rendered("cat")[:, 24:].std() and rendered("cats")[:, 24:].std()
    np.testing.assert_array_equal(rendered("cat")[:, :8], rendered("tac")[:, 16:24])
    assert len({rendered(letter).tobytes() for letter in LETTERS}) == len(LETTERS)
    for noise, low, high in ((0.0, 1.0, 1.0), (0.5, 0.08, 0.16)):  # (1/2 + 1/24)^3.5 = 0.12
        rows = WordsImageTask(letter_noise=noise).train_examples(0, 0, 800)
        right = [np.array_equal(row["image"], rendered(row["prompt"])) for row in rows]
        assert low <= np.mean(right) <= high
    with pytest.raises(ValueError, match=r"letter_noise must be in \[0, 1\]"):
        WordsImageTask(letter_noise=2)


def test_words_are_told_letter_by_letter(tmp_path: Path) -> None:
    model = policy()
    null = len(LETTERS)
    label = model.encode(["cat", "cats", ""])["label"]
    wanted = [[LETTERS.index(c) for c in "cat"] + [null], [LETTERS.index(c) for c in "cats"], [null] * 4]
    assert label.tolist() == wanted
    for wrong in ("catsa", "xyz"):
        with pytest.raises(ValueError, match=f"prompt '{wrong}' is no word of at most 4 of the letters acdeh"):
            model.encode([wrong])
    latents = torch.randn(3, 1, 16, 32, generator=torch.Generator().manual_seed(0))
    time = torch.full((3,), 400.0)
    with torch.no_grad():
        one = model.predict(latents, time, {"label": label}, 3.0)
        swapped = model.predict(latents[:1], time[:1], model.encode(["act"]), 3.0)
        without, given = model.halves(latents, time, {"label": label})
    assert one.shape == latents.shape and (swapped - one[:1]).abs().max() > 1e-3
    torch.testing.assert_close(without[2], given[2])
    torch.testing.assert_close(one, without + 3 * (given - without))
    model.save_pretrained(tmp_path)
    again = ClassPolicy.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again.predict(latents, time, {"label": label}, 3.0), one, rtol=0, atol=0)


def test_patches_go_back_where_they_came_from() -> None:
    """With the transformer's work undone the network is a linear map of each patch onto itself."""
    model = new_policy({"model_type": "word_denoiser", "width": 64, "num_layers": 1}, FLOW, LETTERS, 0)
    net = model.unet
    changed = []
    with torch.no_grad():
        image = torch.zeros(1, 1, 16, 32)
        image[0, 0, 9, 17] = 50.0  # row 1, column 2 of the patches
        for block in net.transformer_blocks:
            for parameter in block.parameters():
                parameter.zero_()
        label = model.encode(["cat"])
        moved = model.predict(image, torch.zeros(1), label, 1.0) - model.predict(0 * image, torch.zeros(1), label, 1.0)
        changed = moved[0, 0].abs().reshape(2, 8, 4, 8).amax((1, 3)) > 1e-6
    assert changed.nonzero().tolist() == [[1, 2]]
