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

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rl.recipes.masked import MaskedOptions
from rl.recipes.options import Recipe

if TYPE_CHECKING:
    import torch

    from rl.estimators.base import Verdicts


class SPGOptions(MaskedOptions):
    name: str = Field("spg", description="Recipe name.")
    old_logprob: Literal["on_policy"] = Field("on_policy", description="No ratio: the gradient of the bounds.")
    prompt_mask: float = Field(0.15, ge=0, lt=1, description="Probability of hiding a prompt token (full attention).")
    power: float = Field(1.5, ge=1, description="b of the upper bound.")
    omega: float = Field(0.5, ge=0, le=1, description="Share of the upper bound for answers worse than their group.")
    draws: int = Field(2, ge=1, description="Masked copies per answer.")
    mask_block: int | None = Field(
        None, ge=1, description="Tokens per block of the masks; null takes the answer whole."
    )

    def build(self) -> Recipe:
        from rl.advantages import sandwich_advantage
        from rl.estimators.masked_copies import block_masks, sandwich_decisions

        centred = self.group_advantage()

        def advantage(verdicts: Verdicts) -> torch.Tensor:
            return sandwich_advantage(centred(verdicts), self.omega)

        return self.masked_recipe(
            partial(block_masks, draws=self.draws, block_length=self.mask_block),
            partial(sandwich_decisions, num_draws=self.draws, power=self.power),
            advantage=advantage,
        )
