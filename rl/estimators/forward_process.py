"""Estimators on the forward process: finished samples are noised again, and the model's predictions are scored.

They need no trajectory and no log-prob, so any sampler will do. With x the model's prediction of x0 and s the sample:

* `NFTRows`, DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117). y is the prediction of the policy that sampled; the
  implicit positive and negative predictions are y + beta (x - y) and y - beta (x - y). The paper mixes velocities;
  mixing predictions of x0 is the same, because both are linear in the output.
* `MatchingRows`: minus a weighted error stands for a log-prob. The error is that of the model's output, or of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from rl.estimators.base import Scores
from rl.estimators.denoising import noised
from rl.estimators.latent_rows import LatentRows, conditioning_of
from rollouts.latent_trajectory import LatentTrajectory
from rollouts.samplers.gaussian import x0_coefficients


@dataclass(kw_only=True)
class ForwardRows(LatentRows):
    """R noised samples; a subclass scores them.

    Attributes:
        sample: [R, ...], the finished samples without noise.
        target: [R, ...], the output that the simple diffusion loss asks for: noise - sample for a flow.
        level: [R, 1, ...] in [0, 1), share of the schedule; t of a flow.
        x0_latent, x0_output: [R, 1, ...]; x0 = x0_latent * noised latent + x0_output * the model's output.
        anchor_output: [R, ...], the output of the recipe's anchor; set by `set_anchor`.
    """

    sample: torch.Tensor
    target: torch.Tensor
    level: torch.Tensor
    x0_latent: torch.Tensor
    x0_output: torch.Tensor
    anchor_output: torch.Tensor | None = None

    def x0(self, output: torch.Tensor) -> torch.Tensor:
        """[R, ...]: the prediction of the sample that an output stands for."""
        return self.x0_latent * self.latent + self.x0_output * output

    @torch.no_grad()
    def set_anchor(self, model: Any) -> None:
        """Keep the outputs of another policy."""
        self.anchor_output = self.predict(model)


def mean_square(difference: torch.Tensor) -> torch.Tensor:
    """[R] of [R, ...]."""
    return difference.square().flatten(1).mean(1)


def normalised_error(prediction: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
    """[R]: mean squared error over the detached mean absolute error, of DiffusionNFT; V-GRPO's equation 14."""
    error = (prediction - sample).flatten(1)
    return error.square().mean(1) / error.detach().abs().mean(1).clamp(min=1e-5)


@dataclass(kw_only=True)
class NFTRows(ForwardRows):
    """Scores are minus the normalised errors of the positive and of the negative prediction.

    Attributes:
        ref_output: [R, ...], the output of the frozen reference; its mean squared distance then stands for a KL.
    """

    beta: float
    ref_output: torch.Tensor | None = None

    @torch.no_grad()
    def set_reference(self, model: Any) -> None:
        self.ref_output = self.predict(model)

    def score(self, model: Any) -> Scores:
        assert self.anchor_output is not None, "call set_anchor with the policy that sampled first"
        output, old = self.predict(model), self.x0(self.anchor_output)
        move = self.beta * (self.x0(output) - old)
        positive, negative = (normalised_error(old + step, self.sample) for step in (move, -move))
        kl = None if self.ref_output is None else mean_square(output - self.ref_output)
        return Scores(-positive, torch.zeros_like(positive), kl, negative=-negative)


@dataclass(kw_only=True)
class MatchingRows(ForwardRows):
    """Minus a weighted error as log-prob: of every noised sample, or averaged over the draws of a sample.

    The mean squared distance to the anchor stands for a KL, of outputs or, with "normalised", of x0.

    Attributes:
        kind: of the error e, the mean squared one of the output: "plain" is e, "ghuber" t ((e + eps)^p - eps^p) / p
            with p = 1/4 and eps = 1e-10; "normalised" is `normalised_error` of x0.
        entries: factor on the error: 1, or D where a log-prob is a sum over a latent's entries.
        draws: noised samples of one decision; rows of a decision stand together.
    """

    kind: str
    entries: int = 1
    draws: int = 1

    def score(self, model: Any) -> Scores:
        output, anchor = self.predict(model), self.anchor_output
        if self.kind == "normalised":
            output = self.x0(output)
            anchor = None if anchor is None else self.x0(anchor)
            error = normalised_error(output, self.sample)
        else:
            error = mean_square(output - self.target)
        if self.kind == "ghuber":
            error = self.level.flatten() * ((error + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25
        logprob = self._decision(-self.entries * error)
        kl = None if anchor is None else self._decision(mean_square(output - anchor))
        return Scores(logprob, torch.zeros_like(logprob), kl)

    def _decision(self, values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, self.draws).mean(1)


FORWARD = TypeVar("FORWARD", bound=ForwardRows)


def forward_rows(
    rows: type[FORWARD],
    trajectories: Sequence[LatentTrajectory],
    model: Any,
    num_draws: int,
    iteration: int = 0,
    shared: bool = False,
    joined: bool = False,
    **fields: Any,
) -> FORWARD:
    """`num_draws` noise levels of every finished sample, one in each of as many equal parts of the schedule.

    Args:
        rows: the class, and `fields` of it.
        iteration: pass over the rollouts; each draws anew, as a function of the trajectories' seeds.
        shared: the rollouts of a prompt share their levels and noises.
        joined: a sample is one decision, not every draw of it.
    """
    data = torch.from_numpy(np.stack([t.latents[-1] for t in trajectories])).repeat_interleave(num_draws, 0)
    level, noise = [], []
    for trajectory in trajectories:
        rng = np.random.default_rng([iteration, *_seed(trajectory, shared)])
        level.append((np.arange(num_draws) + rng.random(num_draws)) / num_draws)
        noise.append(rng.standard_normal((num_draws, *trajectory.latents.shape[1:])))
    levels = np.concatenate(level)
    drawn = torch.from_numpy(np.concatenate(noise)).to(data.dtype)
    mixed, target, timestep = noised(model.scheduler, model.prediction_type, data, drawn, levels)
    latent, output = x0_coefficients(model.scheduler, model.prediction_type, timestep.numpy())
    guidance = float(trajectories[0].sampler["guidance_scale"])
    owner = torch.arange(len(trajectories)).repeat_interleave(num_draws)
    decisions = torch.arange(len(trajectories)) if joined else owner
    level_of, x0_latent, x0_output = (
        torch.from_numpy(values).to(data.dtype).reshape(-1, *[1] * (data.dim() - 1))
        for values in (levels, latent, output)
    )
    return rows(
        latent=mixed,
        sample=data,
        target=target,
        level=level_of,
        timestep=timestep,
        x0_latent=x0_latent,
        x0_output=x0_output,
        conditioning=conditioning_of(trajectories, owner),
        trajectory=decisions,
        step=0 * decisions if joined else torch.arange(num_draws).repeat(len(trajectories)),
        guidance_scale=guidance,
        evaluations=model.num_evaluations(guidance),
        **fields,
    )


def _seed(trajectory: LatentTrajectory, shared: bool) -> list[int]:
    """Of a rollout's own seeds; shared, of its prompt's conditioning and of the weights that sampled."""
    if not shared:
        return [int(s) & 0xFFFFFFFF for s in trajectory.seed]
    return [trajectory.policy_version, *trajectory.prompt_digest()]
