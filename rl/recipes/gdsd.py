"""GDSD: the change of an answer's score is regressed on its advantage.

Advantage-guided self-distillation (arXiv 2605.29398). S is half the log-prob of every token in the one of two
complementary copies that hides it, without weights; the loss is (clamp(S - S_old) - psi A)^2, one decision per answer.
S is no bound of the likelihood (its bias: tests/test_masked_copies.py); only its changes are used.

Choices (published): psi = 10, clamp log(1 -+ 4e-4), reward minus group mean, one pair of masks. Outside the clamp an
answer has no gradient: with a clamp this narrow most answers learn in the first pass over the rollouts only.

Departs: S is per token of the answer, and so is the clamp (published: the clamp acts on the sum, which is then
divided by the length); no KL term by default (its published weight is not in what we read), k2 once it has a weight;
the TLC variant is left out.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from pydantic import Field

from rl.recipes.masked import MaskedOptions
from rl.recipes.options import Recipe


class GDSDOptions(MaskedOptions):
    name: str = Field("gdsd", description="Recipe name.")
    clip_low: float = Field(4e-4, gt=0, lt=1, description="Lower clamp of exp(S - S_old).")
    clip_high: float = Field(4e-4, gt=0, description="Upper clamp of exp(S - S_old).")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k2", description="Estimator of the KL term.")
    psi: float = Field(10.0, gt=0, description="Change of the score asked for per unit of advantage.")
    draws: int = Field(1, ge=1, description="Pairs of complementary masks per answer.")

    def build(self) -> Recipe:
        from rl.estimators.masked_copies import answer_decisions, coupled_counts
        from rl.losses.regression import regression_loss

        names = ("clip_low", "clip_high", "psi", "kl_coef", "kl_estimator", "kl_to")
        return self.masked_recipe(
            partial(coupled_counts, draws=self.draws, weighted=False),
            answer_decisions,
            loss=partial(regression_loss, **{name: getattr(self, name) for name in names}),
        )
