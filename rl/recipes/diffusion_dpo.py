"""Diffusion-DPO: direct preference optimisation on the best and the worst image of every prompt.

Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization" (arXiv 2311.12908), by its code
(SalesforceAIResearch/DiffusionDPO, train.py): both images are noised with the same noise at the same time, and with e
the mean squared error of the model's output

    loss = -log sigmoid(-beta ((e_w - e_w reference) - (e_l - e_l reference))).

Choices: beta = 2500, half of the published beta_dpo of 5000, which its code halves; it is for an error that is a mean
over D = 16,384 entries, so a smaller latent needs a smaller one, or `reduce: sum` (0.15 there is the same).

Departs from the published code: pairs are the policy's own rollouts of a prompt, so equal rewards make none;
`num_draws` averages the errors of several noises inside the sigmoid (VRPO); times are uniform.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rl.batch import DecisionBatch, LossOutput, Tensor
from rl.config import Config
from rl.estimators.base import Verdicts
from rl.recipes.forward import MatchingRecipe


class DiffusionDPO(MatchingRecipe, defaults={"num_draws": 1}):
    shared = True
    joined = True
    unused = ("baseline", "scale", "clip_low", "clip_high", "log_ratio_clamp", "advantage_clip", "entropy_coef")

    old_logprob: Literal["on_policy"] = Field("on_policy", description="No ratio: a pair is compared with itself.")
    kl_to: Literal["none"] = Field("none", description="The loss holds to the starting policy by itself.")
    beta: float = Field(2500.0, gt=0, description="Inverse temperature of the preference.")

    @property
    def needs_reference(self) -> bool:
        return True

    def check(self, config: Config) -> None:
        if config.train.micro_batch_size % 2:
            raise ValueError(
                f"train.micro_batch_size ({config.train.micro_batch_size}) must be even: a pair is scored together"
            )

    def advantage(self, verdicts: Verdicts) -> Tensor:
        """+1 for the best rollout of a prompt, -1 for the worst, NaN for the others."""
        from rl.advantages import best_and_worst

        return best_and_worst(verdicts.reward, verdicts.group)

    def loss(self, batch: DecisionBatch) -> LossOutput:
        from rl.losses.preference import preference_loss

        return preference_loss(batch, self.beta)
