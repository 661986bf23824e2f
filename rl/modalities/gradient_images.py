"""Images sampled with a gradient: rollouts whose decoded ends go to differentiable rewards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from rewards.load import load_reward
from rl.estimators.latent_rows import LatentInput
from rl.modalities.gradient import Forward, GradientSegment
from rl.sections import RewardPartConfig
from rl.tasks.base import Example, reward_columns
from rollouts.samplers.gradient_latent import Predict, gradient_rollout
from rollouts.samplers.noise import CHOICE_STREAM, uniform


class PixelReward:
    """The weighted sum of a config's rewards as a function of float images, with gradient."""

    def __init__(self, run: Any):
        """
        Raises:
            ValueError: a reward without gradient to images.
        """
        parts = [part for part in run.config.reward.trained(run.task.reward) if part.weight]
        self.parts: list[tuple[Any, RewardPartConfig]] = [(load_reward(part.name, part.params), part) for part in parts]
        for reward, part in self.parts:
            if not getattr(reward, "differentiable", False) or not hasattr(reward, "on_tensors"):
                raise ValueError(
                    f"reward {part.name!r} has no gradient to images: choose one with on_tensors "
                    "(docs/image_rewards.md)"
                )

    def __call__(self, images: torch.Tensor, rows: Sequence[Example]) -> torch.Tensor:
        """[B] of images [B, C, H, W] in [0, 1] for the prompts of B rows."""
        columns = reward_columns(rows)
        prompts = [row["prompt"] for row in rows]
        values = []
        for reward, part in self.parts:
            named = {argument: columns[column] for argument, column in part.columns.items()}
            values.append(part.weight * reward.on_tensors(prompts, images, **columns | named))
        return torch.stack(values).sum(0)


class GradientImages:
    """A `GradientSampler` on the sampler of the rollouts: equal seeds give equal images."""

    def __init__(
        self,
        run: Any,
        gradient_steps: int,
        with_reference: bool,
        truncation: str = "fixed",
        recompute: bool = False,
    ):
        """
        Args:
            truncation: "fixed" takes `gradient_steps` for every rollout, "uniform" draws 1 to that many from its seed.

        Raises:
            ValueError: more steps with gradient than steps, or a reward without gradient.
        """
        self.run, self.engine = run, run.engine(run.model)
        steps = len(self.engine.steps)
        if self.engine.steps.mean_previous is not None:
            raise ValueError("sampler.kind dpm_solver looks back: a reward gradient needs ddim, ddpm or a flow kind")
        if self.engine.options.cache is not None:
            raise ValueError("sampler.cache is approximate, and a reward gradient is not: set it to null")
        if self.engine.options.guidance_cosine is not None:
            raise ValueError("sampler.guidance_cosine is a switch, which a reward gradient cannot pass: set it to null")
        if gradient_steps > steps:
            raise ValueError(
                f"algorithm.gradient_steps ({gradient_steps}) must not exceed sampler.num_inference_steps ({steps})"
            )
        self.gradient_steps, self.truncation, self.recompute = gradient_steps, truncation, recompute
        self.reward = PixelReward(run)
        self.num_segments = steps - gradient_steps + 1 if with_reference else 1

    def segments(
        self, policy: Forward, reference: Forward | None, rows: Sequence[Example], seeds: list[int]
    ) -> Iterator[GradientSegment]:
        engine, device = self.engine, self.run.device
        seed = torch.tensor(seeds, dtype=torch.int64, device=device)
        given = engine.encode([row["prompt"] for row in rows])
        guidance = engine.options.guidance_scale

        def through(forward: Forward) -> Predict:
            def predict(index: int, latent: torch.Tensor) -> torch.Tensor:
                timestep = torch.full((len(latent),), engine.steps.timestep[index], device=device)
                return forward(LatentInput(latent, timestep, given, guidance))

            return predict

        latent = engine.start(seed)
        for segment in gradient_rollout(
            through(policy),
            None if reference is None else through(reference),
            engine.steps,
            latent,
            lambda index: engine.noise(seed, index + 1),
            self.gradient_steps,
            self._length(seed),
            engine.options.min_std,
            self.recompute,
        ):
            forwards = segment.evaluations * self.run.model.num_evaluations(guidance)
            if segment.sample is None:
                yield GradientSegment(segment.kl, forwards, latent.numel())
                continue
            pixels = self.run.model.decode(segment.sample)
            reward = self.reward(pixels, rows)
            yield GradientSegment(segment.kl, forwards, latent.numel(), reward, uint8_images(pixels.detach()))

    def _length(self, seed: torch.Tensor) -> torch.Tensor | None:
        """int64 [B]: steps with gradient of every rollout, from its seed alone."""
        if self.truncation == "fixed":
            return None
        zero = torch.zeros_like(seed)
        return (uniform(seed, zero, zero, CHOICE_STREAM) * self.gradient_steps).long() + 1


def uint8_images(pixels: torch.Tensor) -> list[np.ndarray | None]:
    """[H, W, C] each, of float images [B, C, H, W] in [0, 1]; None for one that holds NaN (which would turn black)."""
    images = pixels.mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    whole = pixels.isfinite().flatten(1).all(1).tolist()
    return [image if finite else None for image, finite in zip(images, whole, strict=True)]
