"""The frozen policy as a judge: the posterior of a model whose errors are known, and its form as a reward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rewards.load import load_reward
from rl.models.diffusion_classifier import DiffusionClassifier
from tests.image_models import CLASSES, FLOW, tiny_policy

NAME = "rl.models.diffusion_classifier:DiffusionClassifier"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("judge")
    tiny_policy(FLOW, double=False).save_pretrained(path)
    return str(path)


def test_the_posterior_of_classes_that_are_single_points(folder: str) -> None:
    """Class c is the image m_c, so v = (x_t - m_c) / t and the error of an image m is ||m - m_c||^2 / t^2.

    Draws at t = 1/4 and 3/4: mean of 1 / t^2 is (16 + 16/9) / 2 = 80/9. Images 0, 0.1 and 0.3 in nine entries:
    distances of image 0 are 0, 0.09 and 0.81, so its log-odds are 0.8 and 7.2.
    """
    judge = DiffusionClassifier(folder, draws=2)
    centre = torch.tensor([0.0, 0.1, 0.3]).reshape(3, 1, 1, 1)

    def predict(x: torch.Tensor, timesteps: torch.Tensor, given: Any, scale: float) -> torch.Tensor:
        assert scale == 1
        return (x - centre[given["label"]]) / (timesteps.to(x.dtype) / 1000).reshape(-1, 1, 1, 1)

    judge.model.predict = predict  # type: ignore[method-assign]
    logprob = judge.posterior(torch.zeros(1, 3, 3))
    wanted = torch.tensor([0, -0.8, -7.2], dtype=torch.float64).log_softmax(0)
    torch.testing.assert_close(logprob, wanted, rtol=1e-4, atol=1e-4)
    assert judge.posterior(torch.full((1, 3, 3), 0.3)).argmax() == 2


def test_it_is_a_reward(folder: str) -> None:
    images = list(np.random.default_rng(0).integers(0, 256, (3, 3, 3), dtype=np.uint8))
    values = {v: load_reward(NAME, {"model": folder, "value": v}) for v in ("probability", "logprob", "correct")}
    found = {v: [score.value for score in reward(CLASSES, images)] for v, reward in values.items()}
    np.testing.assert_allclose(np.exp(found["logprob"]), found["probability"])
    same = [[reward([c], [images[0]])[0].value for c in CLASSES] for reward in values.values()]
    assert sum(same[0]) == pytest.approx(1) and sorted(same[2]) == [0, 0, 1]
    assert np.argmax(same[2]) == np.argmax(same[0])
    with pytest.raises(ValueError, match="'four' is not a class of the judging model"):
        values["correct"](["four"], images[:1])
