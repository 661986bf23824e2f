"""BGPO: a lower bound of the likelihood-bound objective that is a plain sum over masked copies.

arXiv 2510.11683; of the paper we read notes, and DARE's code. With d_j the change of one copy's estimate of an
answer's evidence lower bound since sampling, the ratio exp(mean d_j) is replaced by mean(1 + d_j) where A > 0 and by
mean(exp d_j) where A < 0. Both keep A times it below A times the ratio (1 + x <= e^x; Jensen), touch it on-policy with
the same gradient, and need one copy at a time.

Choices (published): 16 copies, one mask each; as in DARE's code the clip acts on the replaced ratio.

Departs: a copy's estimate is per token of the answer, as in `espo`, and every copy is clipped by itself; DARE's second
clip of very bad answers is left out; we do not know the published clip range: 0.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from rl.batch import Tensor
from rl.estimators.draws import Copy, block_masks
from rl.recipes.masked import MaskedRecipe


class BGPO(MaskedRecipe):
    linear_gain = True

    draws: int = Field(16, ge=1, description="Masked copies per answer.")

    def copies(self, places: Any, rng: Any, level: float) -> list[Copy]:
        return block_masks(places, rng, level, self.draws)

    def decide(self, rows: Any, weight: Tensor, lengths: Sequence[int]) -> Any:
        from rl.estimators.masked_copies import copy_decisions

        return copy_decisions(rows, weight, lengths, self.draws)
