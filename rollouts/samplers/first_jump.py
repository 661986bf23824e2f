"""The first steps of a sampler in one: at much noise the score is a Gaussian's with the data's mean and covariance.

Wang and Vastola 2024, "The Unreasonable Effectiveness of Gaussian Score Approximation for Diffusion Models and its
Applications" (arXiv 2412.09726, abstract), skip the first 15 to 30 % of the steps so. With data N(m, C) the latent
s x0 + n z of a timestep is N(s m, s^2 C + n^2 I), and the ODE takes standard noise z to

    s m + (s^2 C + n^2 I)^(1/2) z,

which is where the sampler begins: `sampler.timesteps` names the first timestep that is left to the model. The jump has
no weights, so it is no decision, and the log-probs of the steps after it are what they are anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class DataGaussian:
    """Mean and covariance of latents with D entries: R directions with variances of their own, one for all others.

    Attributes:
        mean: float64 [C, H, W].
        directions: float64 [R, D], orthonormal rows.
        variances: float64 [R].
        rest: variance in every direction that is orthogonal to these.
    """

    mean: np.ndarray
    directions: np.ndarray
    variances: np.ndarray
    rest: float

    @classmethod
    def fit(cls, latents: np.ndarray, rank: int | None = None) -> DataGaussian:
        """Of latents [N, C, H, W]: the `rank` widest directions, at most min(N - 1, D); all of them without `rank`."""
        flat = latents.reshape(len(latents), -1).astype(np.float64)
        mean = flat.mean(0)
        _, scale, directions = np.linalg.svd(flat - mean, full_matrices=False)
        variances = scale**2 / (len(flat) - 1)
        kept = min(rank or len(variances), len(flat) - 1, flat.shape[1])
        left = flat.shape[1] - kept
        rest = float(variances[kept:].sum() / left) if left else 0.0
        return cls(mean.reshape(latents.shape[1:]), directions[:kept], variances[:kept], rest)

    def save(self, path: str) -> None:
        np.savez(path, **vars(self))

    @classmethod
    def load(cls, path: str, shape: tuple[int, ...]) -> DataGaussian:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing, is another one, or is about latents of another shape.
        """
        try:
            with np.load(path) as file:
                found = cls(file["mean"], file["directions"], file["variances"], float(file["rest"]))
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"sampler.first_jump {path!r} cannot be read ({error}): write it with "
                "rollouts.samplers.first_jump.DataGaussian.fit(latents).save(path)"
            ) from error
        if found.mean.shape != tuple(shape):
            raise ValueError(
                f"sampler.first_jump {path!r} is about latents {list(found.mean.shape)}, the model's are {list(shape)}"
            )
        return found

    def jump(self, noise: torch.Tensor, signal: float, level: float) -> torch.Tensor:
        """float64 [N, ...]: standard noise [N, ...] taken to the latents s x0 + n z with s = `signal`, n = `level`."""
        flat = noise.double().flatten(1)
        axes = torch.from_numpy(self.directions).to(flat)
        width = torch.from_numpy(np.sqrt(signal**2 * self.variances + level**2)).to(flat)
        other = (signal**2 * self.rest + level**2) ** 0.5
        moved = other * flat + ((flat @ axes.T) * (width - other)) @ axes
        return signal * torch.from_numpy(self.mean).to(flat) + moved.view(noise.shape)


def levels(scheduler: Any, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of data and noise in the latent before every step and after the last, float64 [T+1] each.

    Args:
        times: [T], of `GaussianSteps.timestep`.
    """
    if not hasattr(scheduler, "alphas_cumprod"):  # that of a flow
        noise = np.append(times / scheduler.config.num_train_timesteps, 0.0)
        return 1 - noise, noise
    alphas = scheduler.alphas_cumprod.double().numpy()
    final = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
    a = np.append(alphas[times.astype(np.int64)], final)
    return np.sqrt(a), np.sqrt(1 - a)
