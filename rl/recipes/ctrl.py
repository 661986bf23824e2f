"""CTRL: give a pretrained diffusion model a new condition, from a classifier of that condition.

Zhao et al. 2024, "Adding Conditional Control to Diffusion Models with Reinforcement Learning" (arXiv 2406.12120):
maximise E[gamma log p(y | x)] - KL(policy given y || pretrained model) over conditions y, drawn per sample. Optimum:
p_pre(x) p(y | x)^gamma / Z_y. Up to the factor gamma this is the path objective with the reward log p(y | x) and
alpha = 1 / gamma.

The reward is conditional (`level_logprob`, or any that reads a row's columns), the task draws the condition and writes
it into the prompt, and the new parameters are the embeddings of new tokens (`model.conditions`). Each starts as a copy
of a known token's, so the starting policy, which the KL holds to, is the pretrained model whatever the condition.

Departs: the conditions are prompt tokens where the paper adds a table to the time embedding; the pathwise gradient is
cut to the last `relaxed.relaxed_steps` steps instead of a random number of them; there is no guidance; all weights are
trained, the new rows with them; the other two estimators, which need no differentiable classifier, are additions.
On images it is `class_tokens` with `alpha` (docs/images.md).
"""

from __future__ import annotations

from pydantic import Field

from rl.config import Config
from rl.recipes.path_objective import PathObjective


class CTRL(PathObjective):
    gamma: float = Field(1.0, gt=0, description="Power of the classifier in the law aimed at, p_pre(x) p(y | x)^gamma.")

    @property
    def kl_weight(self) -> float:
        return 1 / self.gamma

    def check(self, config: Config) -> None:
        if not config.model.conditions:
            raise ValueError("algorithm.name ctrl needs model.conditions: name a new token for every condition")
