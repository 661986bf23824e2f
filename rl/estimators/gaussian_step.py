"""The exact estimator of Gaussian samplers: every denoising step scored on the very latent it started from.

One decision is one step of one trajectory: log N(x_{i+1}; mean_theta(x_i, t_i, c), std_i^2) on the recorded latents,
with the recorded conditioning and guidance. With equal weights it is the sampler's own log-prob, up to the rounding of
the model, which may differ with the batch a row shares.

A latent has D entries, and the log-density of a step is their sum. `reduce="mean"` divides it by D, as DDPO
(Black et al. 2023, arXiv 2305.13301) and all that followed do: a ratio then is the D-th root of the true one. Its clip
must be as much narrower: the published 1e-4 at D = 16,384 bounds the true log-ratio at 1.6, which for D = 64 needs
a clip of 0.026. `reduce="sum"` is the true ratio, whose usual clip of 0.2 holds for any D but is reached sooner.
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
from rollouts.model_protocol import ImagePolicy
from rollouts.samplers.gaussian import gaussian_kl, log_density, step_mean


@dataclass(kw_only=True)
class GaussianRows(LatentRows):
    """U recorded steps; `latent` is the state before a step, `sampler_logprob` is multiplied by `scale`.

    Attributes:
        sample: [U, ...], the state that the step drew.
        coefficients: float64 [U, 5].
        std: float64 [U].
        sampler_mean: [U, ...], recorded.
        clip: of the sampler.
        scale: factor on every sum over entries: 1, or 1/D.
        anchor_mean: [U, ...], means under the anchor of the exact KL, None without one.
    """

    sample: torch.Tensor
    coefficients: torch.Tensor
    std: torch.Tensor
    sampler_mean: torch.Tensor
    clip: float | None
    scale: float
    anchor_mean: torch.Tensor | None = None

    def mean(self, model: ImagePolicy) -> torch.Tensor:
        """float64 [U, ...]: mean of every step under the model's weights, with gradient."""
        return step_mean(self.coefficients, self.clip, self.predict(model), self.latent)

    def logprob(self, mean: torch.Tensor) -> torch.Tensor:
        """float64 [U] of the recorded samples under steps with these means."""
        return log_density(self.sample, mean, self.std) * self.scale

    def kl(self, mean: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """float64 [U]: KL(N(mean, std^2) || N(other, std^2)), exact, on the scale of the log-probs."""
        return gaussian_kl(mean, other, self.std) * self.scale

    @torch.no_grad()
    def set_anchor(self, model: ImagePolicy) -> None:
        """Keep the means under another policy; `score` then gives the KL to it."""
        self.anchor_mean = self.mean(model)

    def score(self, model: ImagePolicy) -> Scores:
        """float64."""
        mean = self.mean(model)
        entropy = self.scale * self.latent[0].numel() * (self.std.log() + 0.5 * math.log(2 * math.pi * math.e))
        kl = None if self.anchor_mean is None else self.kl(mean, self.anchor_mean)
        return Scores(self.logprob(mean), entropy, kl)


def gaussian_rows(
    trajectories: Sequence[LatentTrajectory],
    wanted: np.ndarray | None = None,
    reduce: str = "mean",
    model: ImagePolicy | None = None,
) -> GaussianRows:
    """Rows of the wanted steps that have a density.

    Args:
        wanted: bool [M, T], steps to score; None takes all. Steps whose std is at most the sampler's min_std are left
            out in any case.
        reduce: "mean" or "sum" over the entries of a latent.
        model: knows the forwards of a guided prediction; without it every row counts one.

    Raises:
        ValueError: trajectories of different samplers, or no step has a density.
    """
    if reduce not in ("mean", "sum"):
        raise ValueError(f"algorithm.reduce must be mean or sum, got {reduce!r}")
    first = trajectories[0]
    for t in trajectories:
        if t.sampler != first.sampler or t.num_steps != first.num_steps or t.clip != first.clip:
            raise ValueError("trajectories of one batch must share their sampler settings")
    decides = np.stack([t.is_decision for t in trajectories])
    if not decides.any():
        raise ValueError(
            "no step of the sampler has a density: its std is at most sampler.min_std everywhere; "
            "raise sampler.eta or sampler.noise_level, or lower sampler.min_std"
        )
    trajectory, step = np.nonzero(decides if wanted is None else decides & wanted)

    def pick(name: str, shift: int = 0) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(t, name) for t in trajectories])[trajectory, step + shift])

    owner = torch.from_numpy(trajectory.astype(np.int64))
    guidance = float(first.sampler["guidance_scale"])
    scale = 1.0 if reduce == "sum" else 1.0 / first.num_entries
    return GaussianRows(
        latent=pick("latents"),
        sample=pick("latents", 1),
        timestep=pick("timestep"),
        conditioning=conditioning_of(trajectories, owner),
        coefficients=pick("coefficients"),
        std=pick("std"),
        trajectory=owner,
        step=torch.from_numpy(step.astype(np.int64)),
        sampler_logprob=pick("logprob") * scale,
        sampler_mean=pick("mean"),
        clip=first.clip,
        unguided=None if first.guidance is None else pick("guidance") == 1,
        guidance_scale=guidance,
        evaluations=1 if model is None else model.num_evaluations(guidance),
        scale=scale,
    )


@dataclass(kw_only=True)
class GuardedRows(GaussianRows):
    """Steps whose log-probs are (log-prob + KL to the sampler's Gaussian) std: see `rl.recipes.grpo_guard`."""

    def logprob(self, mean: torch.Tensor) -> torch.Tensor:
        return (super().logprob(mean) + self.kl(mean, self.sampler_mean)) * self.std


def guarded(rows: GaussianRows, trajectories: Sequence[LatentTrajectory]) -> GuardedRows:
    """The same flow steps for GRPO-Guard; the weight of a decision is divided by the length of its step."""
    sigma = np.append(trajectories[0].timestep / 1000, 0.0)
    length = torch.from_numpy(sigma[:-1] - sigma[1:])[rows.step]
    assert rows.sampler_logprob is not None
    changed = {"sampler_logprob": rows.sampler_logprob * rows.std, "weight_factor": 1 / length}
    return GuardedRows(**{**vars(rows), **changed})
