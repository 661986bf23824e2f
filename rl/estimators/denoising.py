"""Supervised training of image models: noised data, and the regression target of the model's prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rl.estimators.base import Scores
from rl.estimators.latent_rows import LatentRows


@dataclass(kw_only=True)
class DenoisingRows(LatentRows):
    """B noised samples; the score of each is minus its mean squared error.

    When the target is the noise, the score is the log-likelihood bound of Ho et al. 2020 (arXiv 2006.11239, simple
    loss), up to a constant and the schedule's weights.
    """

    target: torch.Tensor

    def score(self, model: Any) -> Scores:
        error = (self.predict(model) - self.target).square().flatten(1).mean(1)
        return Scores(-error, torch.zeros_like(error))


def noised(
    scheduler: Any, kind: str, data: torch.Tensor, noise: torch.Tensor, level: np.ndarray
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Data at a noise level, the target of the model's prediction there, and the timestep given to the model.

    Args:
        kind: prediction type of the model (`ImagePolicy`).
        data, noise: [B, ...].
        level: [B] in [0, 1): share of the schedule.
    """
    shape = (-1, *[1] * (data.dim() - 1))
    if kind == "flow":
        t = torch.from_numpy(level).to(data.dtype).reshape(shape)
        return (1 - t) * data + t * noise, noise - data, torch.from_numpy(level * 1000)
    timestep = torch.from_numpy((level * scheduler.config.num_train_timesteps).astype(np.int64))
    a = scheduler.alphas_cumprod[timestep].to(data.dtype).reshape(shape)
    mixed = a.sqrt() * data + (1 - a).sqrt() * noise
    target = {"epsilon": noise, "sample": data, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * data}[kind]
    return mixed, target, timestep


def denoising_rows(
    model: Any, latents: torch.Tensor, prompts: Sequence[Any], part: slice, drop: float, seed: Sequence[int]
) -> DenoisingRows:
    """Rows of the samples in `part`. Noise, levels and dropped prompts are drawn for the whole batch.

    So a sample's noise does not depend on the cut into micro-batches and ranks.
    """
    rng = np.random.default_rng(list(seed))
    count = len(latents)
    level = (rng.permutation(count) + rng.random(count)) / count
    noise = torch.from_numpy(rng.standard_normal(tuple(latents.shape))).to(latents.dtype)
    dropped = rng.random(count) < drop
    shown = [model.null_prompt if gone else prompt for prompt, gone in zip(prompts, dropped, strict=True)]
    mixed, target, timestep = noised(model.scheduler, model.prediction_type, latents[part], noise[part], level[part])
    index = torch.arange(len(mixed))
    return DenoisingRows(
        latent=mixed,
        target=target,
        timestep=timestep,
        conditioning=model.encode(shown[part]),
        trajectory=index,
        step=torch.zeros_like(index),
    )
