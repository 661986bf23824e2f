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

from functools import partial
from typing import Literal

from pydantic import Field

from rl.recipes.masked import MaskedOptions
from rl.recipes.options import Recipe


class CoupledGRPOOptions(MaskedOptions):
    name: str = Field("coupled_grpo", description="Recipe name.")
    baseline: Literal["mean", "leave_one_out"] = Field("leave_one_out", description="Baseline of the group advantage.")
    clip_low: float = Field(0.5, gt=0, lt=1, description="Lower clip of the probability ratio.")
    clip_high: float = Field(0.5, gt=0, description="Upper clip of the probability ratio.")
    kl_to: Literal["none", "old", "reference"] = Field("reference", description="What the KL term holds the policy to.")
    kl_coef: float = Field(0.01, ge=0, description="Weight of the KL term.")
    ratio_low: float = Field(0.2, gt=0, lt=1, description="Smallest mask ratio.")
    ratio_high: float = Field(0.8, gt=0, lt=1, description="Largest mask ratio.")

    def build(self) -> Recipe:
        from rl.estimators.combine import per_token
        from rl.estimators.masked_copies import coupled

        draw = partial(coupled, low=self.ratio_low, high=self.ratio_high)
        return self.masked_recipe(draw, lambda rows, weight, _: per_token(rows, weight), per_token=True)
