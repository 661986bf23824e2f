"""Recipes on Gaussian denoising steps: options, the estimator, and advantages per step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from rl.batch import Tensor
from rl.config import Config
from rl.estimators.base import Verdicts
from rl.recipes.base import Recipe


@dataclass(frozen=True)
class PathSummary:
    """What an advantage needs to know of a trajectory.

    Attributes:
        prompt: equal for trajectories with equal conditioning.
        seed: [T+1], see `LatentTrajectory.seed`: equal beginnings are shared rollouts.
        decides: [T], steps that have a density.
    """

    prompt: str
    seed: tuple[int, ...]
    decides: tuple[bool, ...]


class ImageRecipe(Recipe, defaults={"clip_low": 1e-4, "clip_high": 1e-4}):
    """Every denoising step that has a density is a decision.

    The default clip of 1e-4 is for log-probs that are a mean over D = 16,384 entries.
    """

    modality: ClassVar[str] = "images"
    # Inherited options that a recipe has no use for: the entropy of a step's Gaussian is its std's, which is given.
    unused: ClassVar[tuple[str, ...]] = ("entropy_coef",)

    reduce: Literal["mean", "sum"] = Field(
        "mean", description="Log-prob of a step: mean over a latent's D entries (clip as narrow as 1/D), or their sum."
    )
    kl_estimator: Literal["exact", "k1", "k2", "k3"] = Field(  # type: ignore[assignment]
        "exact", description="KL between the steps' Gaussians, exact, or an estimate from their samples."
    )
    advantage_clip: float = Field(5.0, gt=0, description="Bound on the absolute advantage.")

    @model_validator(mode="after")
    def _uses_what_is_set(self) -> ImageRecipe:
        given = [n for n in self.unused if getattr(self, n) != type(self).model_fields[n].default]
        if given:
            raise ValueError(f"algorithm.{given[0]} does nothing in {self.name}: leave it at its default")
        return self

    @property
    def anchor(self) -> Literal["none", "old", "reference"]:
        return self.kl_to if self.kl_estimator == "exact" else "none"

    def summary(self, trajectory: Any) -> Any:
        decides = tuple(trajectory.is_decision.tolist())
        return PathSummary(trajectory.prompt_digest().hex(), tuple(trajectory.seed.tolist()), decides)

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        import numpy as np

        from rl.estimators.gaussian_step import gaussian_rows

        return gaussian_rows(trajectories, None if steps is None else np.stack(steps), self.reduce, model)

    def num_decisions(self, trajectory: Any, steps: Any = None) -> int:
        decides = trajectory.is_decision
        return int((decides if steps is None else decides & steps).sum())

    def advantage(self, verdicts: Verdicts) -> Tensor:
        return self.clamped(super().advantage(verdicts))

    def clamped(self, advantage: Tensor) -> Tensor:
        return advantage.clamp(-self.advantage_clip, self.advantage_clip)


class IntervalRecipe(ImageRecipe):
    """B²-DiffuRL's backward progressive training: how many of the last steps are trained.

    Its recipes compare a reward with earlier ones of the prompt: a group of equal rewards has an advantage too.
    """

    progressive: bool = Field(True, description="Train the last steps first and extend to all of them.")
    first_interval: int = Field(14, ge=1, description="Steps trained at first, counted from the end of the chain.")
    interval_steps: int = Field(100, ge=1, description="RL steps after which all are trained; set it to train.steps.")
    history: int = Field(8, ge=0, description="Earlier RL steps whose rewards of a prompt count in its statistics.")

    def requires(self, config: Config) -> dict[str, Any]:
        return {"filters.drop_zero_variance": False}

    @property
    def needs_group(self) -> bool:
        return self.history == 0

    def memory(self) -> Any:
        from rl.prompt_history import PromptHistory

        return PromptHistory(self.history)

    def first_step(self, rl_step: int, num_steps: int) -> int:
        """First trained step of T: T - (L + floor(i (T - L + 1) / S)), the published schedule."""
        if not self.progressive:
            return 0
        low = min(self.first_interval, num_steps)
        return max(0, num_steps - low - rl_step * (num_steps - low + 1) // self.interval_steps)


def on_steps(advantage: Tensor, verdicts: Verdicts, first: int = 0) -> Tensor:
    """[M, T]: the advantage of a trajectory at its steps from `first` on that have a density, NaN elsewhere."""
    import torch

    wanted = torch.tensor([n.decides for n in verdicts.summaries])
    wanted[:, :first] = False
    return torch.where(wanted, advantage[:, None], torch.nan)


def branch_of(verdicts: Verdicts, depth: int) -> Tensor:
    """int64 [M]: index of the rollout up to latents[depth] that a trajectory continues, within its prompt's group."""
    import torch

    keys = [(int(g), n.seed[: depth + 1]) for g, n in zip(verdicts.group, verdicts.summaries, strict=True)]
    place = {key: index for index, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([place[key] for key in keys])
