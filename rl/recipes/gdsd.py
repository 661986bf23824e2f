"""GDSD: the change of an answer's score is regressed on its advantage.

Advantage-guided self-distillation (arXiv 2605.29398). S is half the log-prob of every token in the one of two
complementary copies that hides it, without weights; the loss is (clamp(S - S_old) - psi A)^2, one decision per answer.
S is no bound of the likelihood (its bias: tests/test_masked_copies.py); only its changes are used.

Choices (published): psi = 10, clamp log(1 -+ 4e-4), reward minus group mean, one pair of masks. Outside the clamp an
answer has no gradient: with a clamp this narrow most answers learn in the first pass over the rollouts only.

Departs: S is per token of the answer, and so is the clamp (published: the clamp acts on the sum, which is then
divided by the length); no KL term by default (we do not know its published weight), k2 once it has a weight;
the TLC variant is left out.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rl.batch import DecisionBatch, LossOutput
from rl.estimators.draws import Copy, coupled_counts
from rl.recipes.masked import MaskedRecipe


class GDSD(MaskedRecipe, defaults={"clip_low": 4e-4, "clip_high": 4e-4, "kl_estimator": "k2"}):
    psi: float = Field(10.0, gt=0, description="Change of the score asked for per unit of advantage.")
    draws: int = Field(1, ge=1, description="Pairs of complementary masks per answer.")

    def copies(self, places: Any, rng: Any, level: float) -> list[Copy]:
        return coupled_counts(places, rng, level, self.draws, weighted=False)

    def loss(self, batch: DecisionBatch) -> LossOutput:
        from rl.losses.regression import regression_loss

        return regression_loss(
            batch,
            psi=self.psi,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            kl_to=self.kl_to,
            kl_coef=self.kl_coef,
            kl_estimator=self.kl_estimator,
        )
