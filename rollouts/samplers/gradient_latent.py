"""Gaussian sampling with a gradient: with its noise held fixed a sample is a smooth function of the weights.

DRaFT (Clark et al. 2024, arXiv 2309.17400) and AlignProp (Prabhudesai et al. 2023, arXiv 2310.03739): the gradient of a
differentiable reward goes through the last K steps of the sampler; the latent before them is a constant (DRaFT-K). A
rollout may have a K of its own (AlignProp's random truncation).

With a reference, the exact KL between the two samplers' paths: the sum over steps of the KL between their Gaussians, on
the latents that were sampled. Steps without noise have none and are left out of it.

The rollout comes in segments, as that of `relaxed.py`: with a reference every step before the last K is one, whose
graph ends in its latent; without one these steps keep no graph. The last segment is the K steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from rollouts.samplers.gaussian import GaussianSteps, gaussian_kl, gaussian_step, step_mean

# (index of the step, latents before it [B, ...]) -> the model's output [B, ...].
Predict = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass
class LatentSegment:
    """A part of a rollout whose graph stands alone.

    Attributes:
        kl: float64 [B], this part's share of the path KL, with gradient (0 without a reference).
        sample: [B, ...], the finished latent in the last segment, with gradient; else None.
        evaluations: times all B latents go through policy or reference, in the backward pass too.
    """

    kl: torch.Tensor
    sample: torch.Tensor | None
    evaluations: int


def gradient_rollout(
    policy: Predict,
    reference: Predict | None,
    steps: GaussianSteps,
    latent: torch.Tensor,
    noise: Callable[[int], torch.Tensor],
    gradient_steps: int,
    length: torch.Tensor | None = None,
    min_std: float = 0.0,
    recompute: bool = False,
) -> Iterator[LatentSegment]:
    """Denoise B latents, the last steps with gradient.

    Args:
        policy: the model under the weights to train.
        reference: the frozen model that the KL is to; gradient passes to its input only.
        latent: [B, ...], the initial noise.
        noise: index of a step -> [B, ...], standard normal.
        gradient_steps: K.
        length: int64 [B], steps with gradient of every rollout, 1 to K; None for K everywhere.
        min_std: steps with at most this standard deviation count as without noise.
        recompute: keep the latents of the K steps only, and run a step again in the backward pass.
    """
    first = len(steps) - gradient_steps
    table = torch.from_numpy(steps.coefficients).to(latent.device)
    noisy = [std > min_std for std in steps.std.tolist()]

    def evaluations(part: range) -> int:
        return sum(1 + (reference is not None and noisy[index]) for index in part)

    def step(index: int, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The latent after a step, and the step's KL [B]."""
        coefficients = table[index].expand(len(latent), -1)
        std = torch.full((len(latent),), steps.std[index], dtype=torch.float64, device=latent.device)
        output = policy(index, latent)
        after, mean, _ = gaussian_step(coefficients, std, steps.clip, output, latent, noise(index))
        if reference is None or not noisy[index]:
            return after, torch.zeros_like(std)
        other = step_mean(coefficients, steps.clip, reference(index, latent), latent)
        return after, gaussian_kl(mean, other, std)

    for index in range(first):
        with torch.set_grad_enabled(reference is not None and torch.is_grad_enabled()):
            latent, kl = step(index, latent.detach())
        if reference is not None:
            yield LatentSegment(kl, None, evaluations(range(index, index + 1)))
    total = torch.zeros(len(latent), dtype=torch.float64, device=latent.device)
    # Not by `where` below: a gradient of 0 would still go back into the graphs of the segments before.
    latent = latent.detach()
    for index in range(first, len(steps)):
        if length is not None:
            constant = (index <= len(steps) - length).reshape(-1, *[1] * (latent.dim() - 1))
            latent = torch.where(constant, latent.detach(), latent)
        if recompute and torch.is_grad_enabled():
            latent, kl = checkpoint(step, index, latent, use_reentrant=False, preserve_rng_state=False)
        else:
            latent, kl = step(index, latent)
        total = total + kl
    last = range(first, len(steps))
    before = 0 if reference is not None else first
    again = evaluations(last) if recompute and torch.is_grad_enabled() else 0
    yield LatentSegment(total, latent, before + evaluations(last) + again)
