"""The initial noise as the decision: its log-density under the Gaussian that the policy draws it from.

A rollout is one decision, latents[0] of its trajectory. Scoring it runs no denoiser. The head of `gaussian_step.py`
says how mean and sum over a latent's entries change a ratio and its clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rl.estimators.base import Scores
from rl.estimators.latent_rows import LatentRows, conditioning_of
from rollouts.latent_trajectory import LatentTrajectory
from rollouts.model_protocol import LearnedNoise
from rollouts.samplers.gaussian import diagonal_log_density


@dataclass(kw_only=True)
class InitialNoiseRows(LatentRows):
    """U initial latents; no forward, so `evaluations` is 0.

    Attributes:
        scale: factor on every sum over entries: 1, or 1/D.
        anchor: mean and standard deviation [U, ...] under the anchor of the exact KL, None without one.
    """

    scale: float
    anchor: tuple[torch.Tensor, torch.Tensor] | None = None

    @torch.no_grad()
    def set_anchor(self, model: LearnedNoise) -> None:
        """Keep the Gaussians of another policy; `score` then gives the KL to them."""
        self.anchor = model.initial_noise(self.conditioning)

    def score(self, model: LearnedNoise) -> Scores:
        """float64."""
        mean, std = (values.double() for values in model.initial_noise(self.conditioning))
        entropy = (std.log() + 0.5 * math.log(2 * math.pi * math.e)).flatten(1).sum(1)
        logprob = diagonal_log_density(self.latent, mean, std) * self.scale
        kl = None
        if self.anchor is not None:
            center, width = (values.double() for values in self.anchor)
            ratio = (std / width).square()
            entries = 0.5 * (ratio + ((mean - center) / width).square() - 1 - ratio.log())
            kl = entries.flatten(1).sum(1) * self.scale
        return Scores(logprob, entropy * self.scale, kl)


def initial_noise_rows(trajectories: Sequence[LatentTrajectory], reduce: str = "mean") -> InitialNoiseRows:
    """One row per trajectory.

    Raises:
        ValueError: a trajectory started from noise that nobody decided about.
    """
    if any(t.initial_logprob is None for t in trajectories):
        raise ValueError("the rollouts start from standard noise: set model.initial_noise to learned")
    scale = 1.0 if reduce == "sum" else 1.0 / trajectories[0].num_entries
    index = torch.arange(len(trajectories))
    return InitialNoiseRows(
        latent=torch.from_numpy(np.stack([t.latents[0] for t in trajectories])),
        conditioning=conditioning_of(trajectories, index),
        timestep=torch.zeros(len(index), dtype=torch.float64),
        trajectory=index,
        step=torch.zeros_like(index),
        evaluations=0,
        sampler_logprob=torch.tensor([t.initial_logprob for t in trajectories], dtype=torch.float64) * scale,
        scale=scale,
    )
