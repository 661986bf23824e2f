"""Latents as the learner's engine runs them: one forward of an image policy, with gradient to latents and weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rollouts.model_protocol import Conditioning, ImagePolicy


@dataclass
class LatentInput:
    """B latents at one timestep.

    Attributes:
        latent: [B, ...].
        timestep: float64 [B].
        conditioning: name -> [B, ...].
        guidance_scale: of the sampler.
    """

    latent: torch.Tensor
    timestep: torch.Tensor
    conditioning: Conditioning
    guidance_scale: float

    def score(self, model: ImagePolicy) -> torch.Tensor:
        """The guided prediction [B, ...]."""
        return model.predict(self.latent, self.timestep, self.conditioning, self.guidance_scale)
