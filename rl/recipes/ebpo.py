"""EBPO: one ratio per answer, from the likelihood bounds of all its blocks at once.

LLaDA2.1 report 2026 (arXiv 2602.08676), equations 4 and 5: a clipped surrogate with the ratio exp(sum_n w_n sum_b [log
p(y_b | z_n) - log p_old(y_b | z_n)]). z_n is the answer with noise in every block, and a block is scored behind the
clean blocks before it: `[clean | noisy]` scores all of them in one forward per n. The ratio is that of whole answers,
not per token as in `espo`, so it leaves the clip sooner the longer an answer is.

Choices: w_n = 1/N, and within a block one over the share of it that is hidden, so that the sum is an unbiased estimate
of the blocks' bounds; asymmetric clip (`clip_low`, `clip_high`).

Departs: we do not know the published w_n, N and clip range; of the report we read notes and DARE's code.
Full-attention models see later blocks' noise, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from rl.batch import Tensor
from rl.estimators.draws import Copy, every_block
from rl.recipes.masked import MaskedRecipe


class EBPO(MaskedRecipe, defaults={"clip_high": 0.28}):
    draws: int = Field(2, ge=1, description="Levels of noise per answer (N).")
    mask_block: int | None = Field(
        None, ge=1, description="Block length of the noise, on the model's grid; null takes the answer whole."
    )

    def copies(self, places: Any, rng: Any, level: float) -> list[Copy]:
        return every_block(places, rng, level, self.draws, self.mask_block)

    def decide(self, rows: Any, weight: Tensor, lengths: Sequence[int]) -> Any:
        from rl.estimators.masked_copies import answer_decisions

        return answer_decisions(rows, weight / self.draws, [1] * len(lengths))
