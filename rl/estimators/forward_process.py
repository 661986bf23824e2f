"""DiffusionNFT's estimator: finished samples are noised again, and the model's predictions of them are scored.

Zheng et al. 2025 (arXiv 2509.16117). With x the model's prediction of x0 and y that of the policy that sampled, the
implicit positive and negative predictions are y + beta (x - y) and y - beta (x - y). The estimator needs no trajectory
and no log-prob, so any sampler will do. The paper mixes velocities; mixing predictions of x0 is the same, because both
are linear in the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rl.estimators.base import Scores
from rl.estimators.denoising import noised
from rl.estimators.latent_rows import LatentRows, conditioning_of
from rollouts.latent_trajectory import LatentTrajectory
from rollouts.samplers.gaussian import x0_coefficients


@dataclass(kw_only=True)
class ForwardRows(LatentRows):
    """U noised samples; their scores are minus the errors of the positive and of the negative prediction.

    An error is the mean squared distance to the sample, divided by the detached mean absolute distance.

    Attributes:
        sample: [U, ...], the finished samples without noise.
        x0_latent, x0_output: [U, 1, ...]; x0 = x0_latent * noised latent + x0_output * the model's output.
        old_x0: [U, ...], x0 as predicted by the policy that sampled; set by `set_anchor`.
    """

    sample: torch.Tensor
    x0_latent: torch.Tensor
    x0_output: torch.Tensor
    beta: float
    old_x0: torch.Tensor | None = None

    def x0(self, model: Any) -> torch.Tensor:
        """[U, ...]: the model's prediction of the sample."""
        return self.x0_latent * self.latent + self.x0_output * self.predict(model)

    @torch.no_grad()
    def set_anchor(self, model: Any) -> None:
        """Keep the predictions of the policy that sampled."""
        self.old_x0 = self.x0(model)

    def score(self, model: Any) -> Scores:
        assert self.old_x0 is not None, "call set_anchor with the policy that sampled first"
        move = self.beta * (self.x0(model) - self.old_x0)
        positive, negative = self._error(self.old_x0 + move), self._error(self.old_x0 - move)
        return Scores(-positive, torch.zeros_like(positive), negative=-negative)

    def _error(self, prediction: torch.Tensor) -> torch.Tensor:
        distance = (prediction - self.sample).flatten(1)
        return distance.square().mean(1) / distance.detach().abs().mean(1).clamp(min=1e-5)


def forward_rows(
    trajectories: Sequence[LatentTrajectory], model: Any, num_draws: int, beta: float, iteration: int = 0
) -> ForwardRows:
    """`num_draws` noise levels of every finished sample, one in each of as many equal parts of the schedule.

    Args:
        iteration: pass over the rollouts; each draws anew, as a function of the trajectories' seeds.
    """
    data = torch.from_numpy(np.stack([t.latents[-1] for t in trajectories])).repeat_interleave(num_draws, 0)
    level, noise = [], []
    for trajectory in trajectories:
        rng = np.random.default_rng([iteration, *(int(s) & 0xFFFFFFFF for s in trajectory.seed)])
        level.append((np.arange(num_draws) + rng.random(num_draws)) / num_draws)
        noise.append(rng.standard_normal((num_draws, *trajectory.latents.shape[1:])))
    levels = np.concatenate(level)
    drawn = torch.from_numpy(np.concatenate(noise)).to(data.dtype)
    mixed, _, timestep = noised(model.scheduler, model.prediction_type, data, drawn, levels)
    latent, output = x0_coefficients(model.scheduler, model.prediction_type, timestep.numpy())
    shape = (-1, *[1] * (data.dim() - 1))
    guidance = float(trajectories[0].sampler["guidance_scale"])
    owner = torch.arange(len(trajectories)).repeat_interleave(num_draws)
    return ForwardRows(
        latent=mixed,
        sample=data,
        timestep=timestep,
        x0_latent=torch.from_numpy(latent).to(data.dtype).reshape(shape),
        x0_output=torch.from_numpy(output).to(data.dtype).reshape(shape),
        conditioning=conditioning_of(trajectories, owner),
        trajectory=owner,
        step=torch.arange(num_draws).repeat(len(trajectories)),
        guidance_scale=guidance,
        evaluations=model.num_evaluations(guidance),
        beta=beta,
    )
