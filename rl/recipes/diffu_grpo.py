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

from typing import Any

from rl.estimators.draws import Copy, everything_hidden
from rl.recipes.masked import MaskedRecipe


class DiffuGRPO(
    MaskedRecipe,
    defaults={"clip_low": 0.5, "clip_high": 0.5, "kl_to": "reference", "kl_coef": 0.04, "prompt_mask": 0.15},
):
    per_token = True

    def copies(self, places: Any, rng: Any, level: float) -> list[Copy]:
        return everything_hidden(places, rng, level)
