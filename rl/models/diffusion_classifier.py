"""A reward without a model of its own: a frozen diffusion policy says which prompt an image was most likely made for.

Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot Classifier" (arXiv 2303.16203), by its code
(eval_prob_adaptive.py): with the same times and noises for every prompt c, at even times of the schedule,

    p(c | x) = softmax over c of -mean over draws of ||target - output(x_t, t, c)||^2.

Departs from that code: all prompts have all draws (there the likelier ones get more); the squared error is a sum over
the latent's entries, as in a likelihood bound, and not their mean, which ranks alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from rewards.image import to_array
from rewards.score import Score
from rl.estimators.denoising import noised
from rl.models.class_policy import ClassPolicy


class DiffusionClassifier:
    """Name it `rl.models.diffusion_classifier:DiffusionClassifier` in `reward.functions`.

    Args:
        model: folder of a built-in image model, such as `warm_start` of a run: the policy that RL starts from.
        draws: noises per image and prompt.
        value: "probability" or "logprob" of the row's prompt among all classes, or "correct": 1 for the likeliest.
    """

    def __init__(
        self, model: str, draws: int = 8, value: Literal["probability", "logprob", "correct"] = "probability"
    ) -> None:
        if value not in ("probability", "logprob", "correct") or draws < 1:
            raise ValueError("reward diffusion_classifier: value is probability, logprob or correct, draws 1 or more")
        self.model = ClassPolicy.from_pretrained(model).requires_grad_(False)
        self.draws, self.value = draws, value
        self.__name__ = "diffusion_classifier"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        scores = []
        for prompt, latent in zip(prompts, self.model.latents_of([to_array(i) for i in completions]), strict=True):
            if prompt not in self.model.classes:
                raise ValueError(f"prompt {prompt!r} is not a class of the judging model")
            logprob = self.posterior(latent)
            mine = logprob[self.model.classes.index(prompt)]
            right = float(mine == logprob.max())
            found = {"probability": float(mine.exp()), "logprob": float(mine), "correct": right}
            scores.append(Score(found[self.value], metrics={"correct": right}))
        return scores

    @torch.no_grad()
    def posterior(self, latent: torch.Tensor) -> torch.Tensor:
        """float64 [classes]: log p(class | latent)."""
        model, draws, classes = self.model, self.draws, len(self.model.classes)
        level = (np.arange(draws) + 0.5) / draws
        noise = torch.from_numpy(np.random.default_rng(0).standard_normal((draws, *latent.shape))).to(latent.dtype)
        data = latent.expand(draws, *latent.shape)
        parts = noised(model.scheduler, model.prediction_type, data, noise, level)
        mixed, target, timestep = (part.repeat(classes, *[1] * (part.dim() - 1)) for part in parts)
        given = {name: rows.repeat_interleave(draws, 0) for name, rows in model.encode(model.classes).items()}
        error = (target - model.predict(mixed, timestep, given, 1.0)).double().square().flatten(1).sum(1)
        return (-error.view(classes, draws).mean(1)).log_softmax(0)
