"""A Gaussian diffusion model of action chunks: the network, its noise, and one denoising step.

Shape legend: B chunks, H actions of a chunk, A entries of an action, O entries of an observation, T denoising steps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn


class ActionModel(nn.Module):
    """The clean chunk [B, H, A] that a noised one comes from, given what is observed before it.

    With `choices` V, the entries of an action are A / V choices among V values, each a vector of V entries that is 1
    at the chosen value and -1 elsewhere. The clean chunk is then the mean of such vectors under V probabilities, as in
    E0 (Zhan et al. 2025, arXiv 2511.21542), which denoises one-hot vectors of quantised actions under Gaussian noise.
    """

    scale: torch.Tensor

    def __init__(self, chunk_length: int, action_size: int, scale: np.ndarray, choices: int = 0, width: int = 128):
        """
        Args:
            scale: [O], what observations are divided by.
        """
        super().__init__()
        self.shape, self.choices = (chunk_length, action_size), choices
        self.register_buffer("scale", torch.from_numpy(scale).float())
        size = chunk_length * action_size
        self.layers = nn.Sequential(
            nn.Linear(len(scale) + size + 1, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, size),
        )

    def forward(self, chunk: torch.Tensor, level: torch.Tensor, observation: torch.Tensor) -> torch.Tensor:
        """[B, H, A], what the layers say: the clean chunk, or the logits of its choices.

        Args:
            chunk: [B, H, A], noised.
            level: [B], t / T of the chunk.
            observation: [B, O].
        """
        seen = torch.cat([observation / self.scale, chunk.flatten(1), level[:, None]], dim=1)
        return self.layers(seen.float()).unflatten(1, self.shape)

    def clean(self, chunk: torch.Tensor, level: torch.Tensor, observation: torch.Tensor) -> torch.Tensor:
        """float64 [B, H, A]: the clean chunk."""
        said = self(chunk, level, observation).double()
        return 2 * self.by_choice(said).softmax(-1).flatten(2) - 1 if self.choices else said

    def by_choice(self, entries: torch.Tensor) -> torch.Tensor:
        """[B, H, A / V, V]"""
        return entries.unflatten(2, (-1, self.choices))

    def fit(
        self, chunk: torch.Tensor, level: torch.Tensor, observation: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """[B]: minus the squared error of the clean chunk, or the log-probability of its choices, a mean over H A."""
        said = self(chunk, level, observation)
        if not self.choices:
            return -(said - target).square().flatten(1).mean(1)
        chosen = self.by_choice(target).argmax(-1, keepdim=True)
        return self.by_choice(said).log_softmax(-1).gather(-1, chosen).flatten(1).mean(1)

    def denoise(
        self, chunk: torch.Tensor, t: torch.Tensor, observation: torch.Tensor, steps: int, min_std: float
    ) -> ChunkStep:
        """The distribution of the chunk at time t - 1, given the one at time t. Sampler and learner both call it.

        The posterior q(x_{t-1} | x_t, x_0) of DDPM (Ho et al. 2020, arXiv 2006.11239) at the predicted clean chunk, no
        narrower than `min_std`.

        Args:
            t: int64 [B], 1 to T.
            steps: T.
        """
        now, after = (signal(level / steps)[:, None, None] for level in (t, t - 1))
        kept = now / after
        clean = self.clean(chunk, t / steps, observation)
        mean = (after.sqrt() * (1 - kept) * clean + kept.sqrt() * (1 - after) * chunk.double()) / (1 - now)
        return ChunkStep(mean, ((1 - after) / (1 - now) * (1 - kept)).sqrt().clamp_min(min_std))


def signal(level: torch.Tensor) -> torch.Tensor:
    """Share of a chunk's variance that is signal: a squared cosine from 1 at level 0, cut off at 1e-4."""
    return torch.cos(level.double() * math.pi / 2).square().clamp_min(1e-4)


class ChunkStep(NamedTuple):
    """Independent Gaussians: mean float64 [B, H, A] and standard deviation [B, 1, 1] of one denoising step."""

    mean: torch.Tensor
    std: torch.Tensor

    def logprob(self, chunk: torch.Tensor) -> torch.Tensor:
        """[B]: log-density of chunks [B, H, A], summed over their entries."""
        z = (chunk.double() - self.mean) / self.std
        return (-0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)

    def entropy(self) -> torch.Tensor:
        """[B], nats."""
        return (self.std.log() + 0.5 * math.log(2 * math.pi * math.e)).flatten() * self.mean[0].numel()
