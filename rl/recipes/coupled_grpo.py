"""coupled-GRPO: a random mask, its complement, and the fully hidden canvas.

Gong et al. 2025, "DiffuCoder: Understanding and Improving Masked Diffusion Models for Code Generation" (arXiv
2506.20639). Every token is hidden in exactly one of two complementary copies and in the full one; its log-prob is half
the sum of the full copy's and 1/t times the other's. With weights that add up to 1.5 it estimates one and a half
log-probs, not one; ratio and clip act on that number.

Choices (published): ratios t in (0.2, 0.8), leave-one-out advantage without scale, PPO clip of 0.5, k3 KL of 0.01,
no hidden prompt tokens.

Departs: the ratio of a trajectory's masks is spread evenly over the passes, not drawn anew.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rl.estimators.draws import Copy, coupled
from rl.recipes.masked import MaskedRecipe


class CoupledGRPO(
    MaskedRecipe,
    defaults={"baseline": "leave_one_out", "clip_low": 0.5, "clip_high": 0.5, "kl_to": "reference", "kl_coef": 0.01},
):
    per_token = True

    ratio_low: float = Field(0.2, gt=0, lt=1, description="Smallest mask ratio.")
    ratio_high: float = Field(0.8, gt=0, lt=1, description="Largest mask ratio.")

    def copies(self, places: Any, rng: Any, level: float) -> list[Copy]:
        return coupled(places, rng, level, self.ratio_low, self.ratio_high)
