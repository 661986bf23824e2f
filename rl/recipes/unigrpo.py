"""UniGRPO: one forward at a random mask ratio.

Yang et al. 2025, "MMaDA: Multimodal Large Diffusion Language Models" (arXiv 2505.15809). The answer is hidden at a
uniform ratio (never the prompt); the hidden tokens are scored and averaged. Ratios are spread evenly over the passes
over the rollouts instead of drawn independently.

Choices: rewards z-scored in the group and PPO clip of 0.2 as in GRPO; each answer counts once, its hidden tokens
sharing the weight. The weight of the KL to the starting policy is not given in what we read: 0.01.

Departs: the number hidden is the ratio times the answer's length rounded up, not a binomial draw, so that every
answer has a token to score.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

from pydantic import Field

from rl.recipes.masked import MaskedOptions
from rl.recipes.options import Recipe


class UniGRPOOptions(MaskedOptions):
    name: str = Field("unigrpo", description="Recipe name.")
    scale: Literal["none", "std", "batch_std"] = Field("std", description="What advantages are divided by.")
    kl_to: Literal["none", "old", "reference"] = Field("reference", description="What the KL term holds the policy to.")
    kl_coef: float = Field(0.01, ge=0, description="Weight of the KL term.")
    ratio_low: float = Field(0.0, ge=0, lt=1, description="Smallest mask ratio.")
    ratio_high: float = Field(1.0, gt=0, le=1, description="Largest mask ratio.")

    def build(self) -> Recipe:
        from rl.estimators.masked_copies import random_ratio

        def decide(rows: Any, weight: Any, lengths: Any) -> Any:
            return replace(rows, weight_factor=1.0 / rows.trajectory.bincount()[rows.trajectory].double())

        return self.masked_recipe(partial(random_ratio, low=self.ratio_low, high=self.ratio_high), decide)
