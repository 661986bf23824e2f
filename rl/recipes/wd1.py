"""wd1: a weighted log-likelihood, without ratio, old policy or reference.

Tang et al. 2025, "wd1: Weighted Policy Optimization for Reasoning in Diffusion Language Models" (arXiv 2507.08838).
Over the rollouts of a prompt, w+ = softmax(A / psi) and w- = softmax(-A / psi); the loss is the sum of
(w- - w+) log pi(answer), with d1's one-step estimate of log pi. Good answers are imitated, bad ones unlearned, and the
weights of a group add up to 0.

Choices: psi = 1 (we do not know the published value), the log-prob of an answer is the mean over its tokens, prompt
tokens hidden with probability 0.15 as in d1. The term is the policy gradient with a ratio of 1 (`old_logprob`
on_policy), so the shared loss serves.

Departs: the sum over a group's rollouts is a mean (a constant factor G, which Adam does not see).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rl.batch import Tensor
from rl.estimators.base import Verdicts
from rl.estimators.draws import Copy, everything_hidden
from rl.recipes.masked import MaskedRecipe


class WD1(MaskedRecipe, defaults={"prompt_mask": 0.15}):
    old_logprob: Literal["on_policy"] = Field("on_policy", description="No ratio: the gradient of the log-prob itself.")
    psi: float = Field(1.0, gt=0, description="Temperature of the weights.")

    def copies(self, places: Any, rng: Any, level: float) -> list[Copy]:
        return everything_hidden(places, rng, level)

    def advantage(self, verdicts: Verdicts) -> Tensor:
        from rl.advantages import contrast_advantage

        return contrast_advantage(super().advantage(verdicts), verdicts.group, self.psi)
