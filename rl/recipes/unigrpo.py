"""UniGRPO: one forward at a random mask ratio.

Yang et al. 2025, "MMaDA: Multimodal Large Diffusion Language Models" (arXiv 2505.15809). The answer is hidden at a
uniform ratio (never the prompt); the hidden tokens are scored and averaged. Ratios are spread evenly over the passes
over the rollouts instead of drawn independently.

Choices: rewards z-scored in the group and PPO clip of 0.2 as in GRPO; each answer counts once, its hidden tokens
sharing the weight. We do not know the published weight of the KL to the starting policy: 0.01.

Departs: the number hidden is the ratio times the answer's length rounded up, not a binomial draw, so that every
answer has a token to score.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import Field

from rl.estimators.draws import Copy, random_ratio
from rl.recipes.masked import MaskedRecipe


class UniGRPO(MaskedRecipe, defaults={"scale": "std", "kl_to": "reference", "kl_coef": 0.01}):
    ratio_low: float = Field(0.0, ge=0, lt=1, description="Smallest mask ratio.")
    ratio_high: float = Field(1.0, gt=0, le=1, description="Largest mask ratio.")

    def copies(self, places: Any, rng: Any, level: float) -> list[Copy]:
        return random_ratio(places, rng, level, self.ratio_low, self.ratio_high)

    def decide(self, rows: Any, weight: Any, lengths: Any) -> Any:
        """Every hidden token is a decision; those of an answer share its weight."""
        return replace(rows, weight_factor=1.0 / rows.trajectory.bincount()[rows.trajectory].double())
