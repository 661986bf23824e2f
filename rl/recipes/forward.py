"""Recipes on the forward process: finished samples are noised again, so any sampler will do."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from rl.recipes.images import ImageRecipe


class MatchingRecipe(ImageRecipe, defaults={"old_logprob": "on_policy"}):
    """Minus a weighted denoising error in the place of a log-prob (`rl.estimators.forward_process.MatchingRows`).

    Its distance to another policy is not a divergence of sampled steps, so `kl_estimator` is always exact.
    """

    redraw = True
    # Of the error; rollouts of a prompt share noises; the draws of a sample are one decision.
    error: ClassVar[str] = "plain"
    shared: ClassVar[bool] = False
    joined: ClassVar[bool] = False

    num_draws: int = Field(4, ge=1, description="Noise levels per sample and pass over the rollouts.")

    @model_validator(mode="after")
    def _no_sampler(self) -> MatchingRecipe:
        if self.old_logprob == "sampler":
            raise ValueError(
                f"algorithm.old_logprob of {self.name} must be on_policy or recompute: samplers record no such errors"
            )
        if self.kl_estimator != "exact":
            raise ValueError(f"algorithm.kl_estimator of {self.name} must be exact: there are no log-probs to estimate")
        return self

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        from rl.estimators.forward_process import MatchingRows, forward_rows

        return forward_rows(
            MatchingRows,
            trajectories,
            model,
            self.num_draws,
            iteration,
            self.shared,
            self.joined,
            kind=self.error,
            entries=trajectories[0].num_entries if self.reduce == "sum" else 1,
            draws=self.num_draws if self.joined else 1,
        )

    def num_decisions(self, trajectory: Any, steps: Any = None) -> int:
        return 1 if self.joined else self.num_draws
