"""The common part of the rows of continuous samples, and one latent forward on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rl.estimators.base import Rows
from rollouts.latent_trajectory import LatentTrajectory
from rollouts.model_protocol import Conditioning, ImagePolicy


@dataclass(kw_only=True)
class LatentRows(Rows):
    """U latents to forward, one decision each.

    Attributes:
        latent: [U, ...], the model's input.
        timestep: [U].
        conditioning: name -> [U, ...].
        guidance_scale: of the sampler.
        evaluations: runs of the network that one guided prediction takes (`ImagePolicy.num_evaluations`).
        unguided: bool [U], rows that were sampled without guidance (`sampler.guidance_cosine`); None for none of them.
    """

    latent: torch.Tensor
    timestep: torch.Tensor
    conditioning: dict[str, torch.Tensor]
    guidance_scale: float = 1.0
    evaluations: int = 1
    unguided: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Latents that go through the network in one forward; guidance may double them."""
        without = 0 if self.unguided is None else int(self.unguided.sum())
        return (len(self.latent) - without) * self.evaluations + without

    @property
    def num_tokens(self) -> int:
        return self.num_rows * self.latent[0].numel()

    def predict(self, model: Any) -> torch.Tensor:
        """[U, ...]: the model's guided output, with gradient."""
        if self.unguided is None:
            return model.predict(self.latent, self.timestep, self.conditioning, self.guidance_scale)
        output = torch.zeros_like(self.latent)
        for kind, scale in ((self.unguided, 1.0), (~self.unguided, self.guidance_scale)):
            # Without rows of a kind one that is not taken: sharded models run equally often on every rank.
            part = kind.nonzero()[:, 0] if kind.any() else torch.zeros(1, dtype=torch.int64, device=kind.device)
            rows = {name: values[part] for name, values in self.conditioning.items()}
            found = model.predict(self.latent[part], self.timestep[part], rows, scale)
            output = output.index_put((part,), found) if kind.any() else output + 0 * found.sum()
        return output


def conditioning_of(trajectories: Sequence[LatentTrajectory], owner: torch.Tensor) -> dict[str, torch.Tensor]:
    """name -> [U, ...]: the recorded conditioning of the trajectories that U decisions belong to."""
    return {
        name: torch.from_numpy(np.stack([t.conditioning[name] for t in trajectories]))[owner]
        for name in trajectories[0].conditioning
    }


@dataclass
class LatentInput:
    """One forward of an image policy under the learner's weights, with gradient to latents and weights.

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
