"""What the rows of continuous samples have in common: one latent a row, its conditioning, and what a forward costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch


@dataclass(kw_only=True)
class LatentRows:
    """U latents to forward, one decision each; the common part of `rl.estimators.base.Rows`.

    Attributes:
        latent: [U, ...], what the model is shown.
        timestep: [U].
        conditioning: name -> [U, ...].
        trajectory: int64 [U], index among the trajectories given; ascending.
        step: int64 [U].
        guidance_scale: of the sampler.
        evaluations: runs of the network that one guided prediction takes (`ImagePolicy.num_evaluations`).
        sampler_logprob, weight_factor: float64 [U] or None.
    """

    latent: torch.Tensor
    timestep: torch.Tensor
    conditioning: dict[str, torch.Tensor]
    trajectory: torch.Tensor
    step: torch.Tensor
    guidance_scale: float = 1.0
    evaluations: int = 1
    sampler_logprob: torch.Tensor | None = None
    weight_factor: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Latents that go through the network in one forward; guidance may double them."""
        return len(self.step) * self.evaluations

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.latent[0].numel()

    def to(self, device: torch.device | str) -> Self:
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, conditioning={k: v.to(device) for k, v in self.conditioning.items()}, **moved)

    def distinct(self) -> Self:
        return self

    def predict(self, model: Any) -> torch.Tensor:
        """[U, ...]: the model's guided output, with gradient."""
        return model.predict(self.latent, self.timestep, self.conditioning, self.guidance_scale)
