"""ESPO: the whole answer is one action, its likelihood the evidence lower bound.

Ou et al. 2025, "Principled RL for Diffusion LLMs Emerges from a Sequence-Level Perspective" (arXiv 2512.03759). The
bound is estimated from pairs of complementary masks, two of them, and is unbiased. Ratio, clip and KL apply to the
bound per token, one decision per answer: split over tokens it would be no bound of anything.

Choices (published): M = 2 pairs, ratio exp((L - L_old) / length) with PPO clip, k2 KL (3e-3, the value for Countdown;
1e-2 for Sudoku and code, 1e-3 for mathematics). We do not know the published clip range: 0.2.

Departs: k2 acts on the bound per token, as the ratio does; the numbers of hidden tokens are stratified over an answer's
pairs and passes, not over the batch, so that they do not depend on how it is cut.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rl.estimators.draws import Copy, coupled_counts
from rl.recipes.masked import MaskedRecipe


class ESPO(MaskedRecipe, defaults={"kl_to": "reference", "kl_coef": 3e-3, "kl_estimator": "k2"}):
    draws: int = Field(2, ge=1, description="Pairs of complementary masks per answer (M).")

    def copies(self, places: Any, rng: Any, level: float) -> list[Copy]:
        return coupled_counts(places, rng, level, self.draws)
