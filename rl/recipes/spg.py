"""SPG: raise a lower bound of good answers' likelihood, lower an upper bound of bad ones'.

Wang et al. 2025, "SPG: Sandwiched Policy Gradient for Masked Diffusion Language Models" (arXiv 2510.09541). Both bounds
are read from the same masked copies: the evidence lower bound, and per token (1/b) log E[weight p^b]. An
answer with A >= 0 takes the lower bound, one with A < 0 the mixture omega upper + (1 - omega) lower. No ratio, no KL.

Choices (published): b = 1.5 (1.0 for Sudoku), omega = 0.5, two draws, prompt tokens hidden with probability 0.15,
reward minus group mean. Each answer makes two decisions, step 0 and step 1, and the advantage [M, 2] mixes them.

Departs: masks fall on the whole answer unless `mask_block` is set (published: block-wise); bounds are per token of the
answer (published: weighted by its length); the upper bound from two draws leaves
tokens out that neither hides (its bias: tests/test_masked_copies.py).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rl.batch import Tensor
from rl.estimators.base import Verdicts
from rl.estimators.draws import Copy, block_masks
from rl.recipes.masked import MaskedRecipe


class SPG(MaskedRecipe, defaults={"prompt_mask": 0.15}):
    old_logprob: Literal["on_policy"] = Field("on_policy", description="No ratio: the gradient of the bounds.")
    power: float = Field(1.5, ge=1, description="b of the upper bound.")
    omega: float = Field(0.5, ge=0, le=1, description="Share of the upper bound for answers worse than their group.")
    draws: int = Field(2, ge=1, description="Masked copies per answer.")
    mask_block: int | None = Field(
        None, ge=1, description="Tokens per block of the masks; null takes the answer whole."
    )

    def copies(self, places: Any, rng: Any, level: float) -> list[Copy]:
        return block_masks(places, rng, level, self.draws, self.mask_block)

    def decide(self, rows: Any, weight: Any, lengths: Any) -> Any:
        from rl.estimators.masked_copies import sandwich_decisions

        return sandwich_decisions(rows, weight, lengths, self.draws, self.power)

    def advantage(self, verdicts: Verdicts) -> Tensor:
        from rl.advantages import sandwich_advantage

        return sandwich_advantage(super().advantage(verdicts), self.omega)
