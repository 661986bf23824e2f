"""RSPO: an answer's advantage is the target of its log-ratio to the starting policy.

Yu et al. 2026, "Relative Score Policy Optimization for Diffusion Language Models" (arXiv 2605.10218). With d the
difference between the evidence lower bounds of an answer under the policy and under the starting policy, the loss is
(lambda / 2) (d - A / lambda)^2: the gap to the target drives the update, not the advantage alone. Written out, this is
-A d + lambda d^2 / 2 and a constant: a policy gradient without ratio, and a k2 KL of weight lambda (`kl_coef`) to the
starting policy. That is how it is computed here.

Choices: lambda = 0.01, two pairs of complementary masks as in `espo`, rewards minus the group mean.

Departs, or is not known to us: of the paper we read the abstract, and another implementation's statement of its
equation 3.3. Bounds are per token of the answer. `gdsd`, the nearest relative, regresses the change since sampling
within a narrow clamp.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rl.estimators.draws import Copy, coupled_counts
from rl.recipes.masked import MaskedRecipe


class RSPO(MaskedRecipe, defaults={"kl_to": "reference", "kl_coef": 0.01, "kl_estimator": "k2"}):
    old_logprob: Literal["on_policy"] = Field("on_policy", description="No ratio to the policy that sampled.")
    draws: int = Field(2, ge=1, description="Pairs of complementary masks per answer.")

    def copies(self, places: Any, rng: Any, level: float) -> list[Copy]:
        return coupled_counts(places, rng, level, self.draws)
