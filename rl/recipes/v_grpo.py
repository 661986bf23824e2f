"""V-GRPO: GRPO with a bound on the likelihood of finished samples in the place of the steps' log-probs.

Tang et al. 2026, "V-GRPO: Online Reinforcement Learning for Denoising Generative Models Is Easier than You Think"
(arXiv 2604.23380), by its abstract and a description and an implementation of its equations (vrl/algorithms/v_grpo.py):

    logprob = -mean over n draws (t, noise) of mean (x - x0)^2 / detached mean |x - x0|    (equation 14),
    loss = max(-A ratio, -A clip(ratio)) + kl_coef mean (x - x_old)^2                    (equation 16),

x the prediction of the sample x0, one ratio for a sample, A = eta tanh(A / eta) (equation 17). The rollouts of a prompt
share their draws, one in each of n equal parts of the schedule. Example: A = 3 becomes 3 tanh(1) = 2.28.

Choices: n = 4, eta = 3, one update per rollout, where the ratio is 1 (published for SD 3.5). Departs: a z-score of the
group is clamped at `advantage_clip` before eta; a reference may take the place of the old policy in the distance.
"""

from __future__ import annotations

from pydantic import Field

from rl.batch import Tensor
from rl.estimators.base import Verdicts
from rl.recipes.forward import MatchingRecipe


class VGRPO(MatchingRecipe, defaults={"scale": "std"}):
    error = "normalised"
    shared = True
    joined = True

    soft_clip: float = Field(3.0, gt=0, description="eta, the bound that advantages approach: eta tanh(A / eta).")

    def advantage(self, verdicts: Verdicts) -> Tensor:
        return self.soft_clip * (super().advantage(verdicts) / self.soft_clip).tanh()
