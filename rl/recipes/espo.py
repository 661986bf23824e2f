"""ESPO: the whole answer is one action, its likelihood the evidence lower bound.

Ou et al. 2025, "Principled RL for Diffusion LLMs Emerges from a Sequence-Level Perspective" (arXiv 2512.03759). The
bound is estimated from pairs of complementary masks, two of them, and is unbiased. Ratio, clip and KL apply to the
bound per token, one decision per answer: split over tokens it would be no bound of anything.

Choices (published): M = 2 pairs, ratio exp((L - L_old) / length) with PPO clip, k2 KL (3e-3, the value for Countdown;
1e-2 for Sudoku and code, 1e-3 for mathematics). The clip range is not in what we read: 0.2.

Departs: k2 acts on the bound per token, as the ratio does; the numbers of hidden tokens are stratified over an answer's
pairs and passes, not over the batch, so that they do not depend on how it is cut.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field

from rl.recipes.masked import MaskedOptions
from rl.recipes.options import Recipe


class ESPOOptions(MaskedOptions):
    name: str = Field("espo", description="Recipe name.")
    kl_to: Literal["none", "old", "reference"] = Field("reference", description="What the KL term holds the policy to.")
    kl_coef: float = Field(3e-3, ge=0, description="Weight of the KL term.")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k2", description="Estimator of the KL term.")
    draws: int = Field(2, ge=1, description="Pairs of complementary masks per answer (M).")

    def build(self) -> Recipe:
        from rl.estimators.masked_copies import answer_decisions, coupled_counts

        return self.masked_recipe(partial(coupled_counts, draws=self.draws), answer_decisions)
