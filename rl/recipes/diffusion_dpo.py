"""Diffusion-DPO: direct preference optimisation on pairs of images, of a file or the best and worst of every prompt.

Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization" (arXiv 2311.12908), by its code
(SalesforceAIResearch/DiffusionDPO, train.py): both images are noised with the same noise at the same time, and with e
the mean squared error of the model's output

    loss = -log sigmoid(-beta ((e_w - e_w reference) - (e_l - e_l reference))).

Choices: beta = 2500, half of the published beta_dpo of 5000, which its code halves; it is for an error that is a mean
over D = 16,384 entries, so a smaller latent needs a smaller one, or `reduce: sum` (0.15 there is the same).

Departs from the published code: without a file pairs are the policy's own rollouts (`PairedRecipe`); `num_draws`
averages the errors of several noises inside the sigmoid (VRPO); times are uniform; a stored image is encoded to
the mean of the VAE's Gaussian, not to a draw of it.
"""

from __future__ import annotations

from pydantic import Field

from rl.batch import DecisionBatch, LossOutput
from rl.recipes.forward import MatchingRecipe
from rl.recipes.paired import PairedRecipe


class DiffusionDPO(PairedRecipe, MatchingRecipe, defaults={"num_draws": 1}):
    shared = True
    joined = True
    unused = ("baseline", "scale", "clip_low", "clip_high", "log_ratio_clamp", "advantage_clip", "entropy_coef")

    beta: float = Field(2500.0, gt=0, description="Inverse temperature of the preference.")

    def loss(self, batch: DecisionBatch) -> LossOutput:
        from rl.losses.preference import preference_loss

        return preference_loss(batch, self.beta)
