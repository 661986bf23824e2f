"""VRPO: direct preference optimisation on pairs of answers, with evidence lower bounds in place of log-likelihoods.

Zhu et al. 2025, "LLaDA 1.5: Variance-Reduced Preference Optimization for Large Language Diffusion Models" (arXiv
2505.19223): -log sigmoid(beta (B(y_w) - B_ref(y_w)) - beta (B(y_l) - B_ref(y_l))), B an estimate of an answer's bound.
Its variance makes the loss biased, so n draws have n mask ratios with one mask each, and policy and reference see the
same masks (antithetic sampling).

Pairs are rollouts or rows of a file, see `PairedRecipe`.

Choices: n = 8; beta = 0.1 (we do not know the published one). Departs: mask ratios are stratified over the n draws,
not independent; the pairs of rollouts are an addition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from rl.batch import DecisionBatch, LossOutput, Tensor
from rl.estimators.draws import Copy, block_masks
from rl.recipes.masked import MaskedRecipe
from rl.recipes.paired import PairedRecipe


class VRPO(PairedRecipe, MaskedRecipe):
    beta: float = Field(0.1, gt=0, description="Inverse temperature of the preference.")
    draws: int = Field(8, ge=1, description="Mask ratios per answer (n).")

    def copies(self, places: Any, rng: Any, level: float) -> list[Copy]:
        return block_masks(places, rng, level, self.draws)

    def decide(self, rows: Any, weight: Tensor, lengths: Sequence[int]) -> Any:
        from rl.estimators.masked_copies import answer_decisions

        return answer_decisions(rows, weight / self.draws, [1] * len(lengths))

    def loss(self, batch: DecisionBatch) -> LossOutput:
        from rl.losses.preference import preference_loss

        output = preference_loss(batch, self.beta)
        return LossOutput(output.loss - self.entropy_coef * batch.entropy, output.metrics)
