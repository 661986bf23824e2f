"""diffu-GRPO, the reinforcement learning of d1: one forward with the whole answer hidden.

Zhao et al. 2025, "d1: Scaling Reasoning in Diffusion Large Language Models via Reinforcement Learning" (arXiv
2504.12216). A token's log-prob is read from the canvas without any answer token; each prompt token is hidden with
probability 0.15, anew for every pass over the rollouts, which makes the many passes (mu) differ. It is the log-prob of
a decoder that fills everything in one step (mean field): the trace estimate with all steps merged.

Choices (published): reward minus group mean, PPO clip of 0.5, k3 KL of 0.04, tokens up to the first end token,
mean over the tokens of an answer, then over answers.

Departs: a block-causal model (set prompt_mask to 0) sees clean the blocks before the one it fills, in one step; the
reference stays the starting policy (published: synchronised every 64 steps); temperature and filters of
the sampler hold in the loss.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rl.recipes.masked import MaskedOptions
from rl.recipes.options import Recipe


class DiffuGRPOOptions(MaskedOptions):
    name: str = Field("diffu_grpo", description="Recipe name.")
    clip_low: float = Field(0.5, gt=0, lt=1, description="Lower clip of the probability ratio.")
    clip_high: float = Field(0.5, gt=0, description="Upper clip of the probability ratio.")
    kl_to: Literal["none", "old", "reference"] = Field("reference", description="What the KL term holds the policy to.")
    kl_coef: float = Field(0.04, ge=0, description="Weight of the KL term.")
    prompt_mask: float = Field(0.15, ge=0, lt=1, description="Probability of hiding a prompt token (full attention).")

    def build(self) -> Recipe:
        from rl.estimators.combine import per_token
        from rl.estimators.masked_copies import everything_hidden

        return self.masked_recipe(everything_hidden, lambda rows, weight, _: per_token(rows, weight), per_token=True)
