"""DRAKES: reward gradients through a relaxed denoising trajectory, held to the pretrained model by a path KL.

Wang et al. 2024, "Fine-Tuning Discrete Diffusion Models via Reward Optimization with Applications to DNA and Protein
Design" (arXiv 2410.13643). The objective is E[reward] - alpha * KL(path of the policy || path of the pretrained model);
with one position per step its optimum is the law p_pre(x) exp(reward / alpha) / Z. Three estimators of its gradient:

* `pathwise`: the published one. Gumbel-softmax over the last steps, a differentiable reward. Biased, since the soft
  path is another sampler than the hard one.
* `score_function`: reward - alpha * log-ratio of the path, in place of the reward, on exact trace log-probs. Unbiased
  where the order of reveals does not depend on the model (`sampler.score` random, or selector left_most); any reward.
* `weighted_regression`: cross-entropy on sampled paths, weighted by the group's softmax of reward / alpha - log-ratio
  (MDNS, arXiv 2508.10684, and TR2-D2, arXiv 2509.25171, do so off-policy with a buffer).

Departs from the published code in the KL's weight and in how soft states keep their mass (`relaxed.kl_weight`,
`relaxed.carry_over`: `released` restores both); reference and oracle are frozen; nothing is sampled or scored twice.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from rl.algorithms.options import Recipe, RecipeOptions
from rl.algorithms.tracerl import TraceRLOptions
from rollouts.samplers.options import RelaxedOptions

if TYPE_CHECKING:
    import torch

    from rl.estimators.base import Verdicts
    from rl.train.reward_gradient import GradientRecipe


class DrakesOptions(RecipeOptions):
    name: str = Field("drakes", description="Recipe name.")
    gradient: Literal["pathwise", "score_function", "weighted_regression"] = Field(
        "pathwise", description="How the gradient of the objective is estimated."
    )
    alpha: float = Field(0.01, ge=0, description="Weight of the KL along the path to the starting policy.")
    relaxed: RelaxedOptions = Field(RelaxedOptions(), description="The relaxed rollout of gradient pathwise.")

    @model_validator(mode="after")
    def _fits(self) -> DrakesOptions:
        if self.kl_coef > 0:
            raise ValueError("algorithm.kl_coef is not DRAKES' KL: set algorithm.alpha")
        if self.gradient == "weighted_regression" and self.alpha == 0:
            raise ValueError("algorithm.alpha must be above 0 for gradient weighted_regression: it is the temperature")
        return self

    def engine_needs(self) -> set[str]:
        return {"gradients"} if self.gradient == "pathwise" else {"step_maps", "sampled_logprobs"}

    def build(self) -> Recipe | GradientRecipe:  # type: ignore[override]
        if self.gradient == "pathwise":
            from rl.media.soft_text import RelaxedText
            from rl.train.reward_gradient import GradientRecipe

            sampler = partial(RelaxedText, options=self.relaxed, with_reference=self.alpha > 0)
            return GradientRecipe(sampler=sampler, kl_coef=self.alpha)
        trace = TraceRLOptions().build()
        return Recipe(
            rows=trace.rows,
            advantage=self.advantage,
            loss=self.policy_loss(),
            needs_reference=self.alpha > 0,
            needs_log_ratio=self.alpha > 0,
            # Regression has no ratio: the gradient of -weight * logprob at every update.
            old_logprob="on_policy" if self.gradient == "weighted_regression" else self.old_logprob,
            aggregation=self.aggregation,
        )

    def advantage(self, verdicts: Verdicts) -> torch.Tensor:
        """[M]: reward - alpha * log-ratio, centred in its group, or its softmax weight there at temperature alpha."""
        from rl.advantages import group_advantage, group_softmax

        value = verdicts.reward
        if verdicts.log_ratio is not None:
            value = value - self.alpha * verdicts.log_ratio
        if self.gradient == "weighted_regression":
            return group_softmax(value / self.alpha, verdicts.group)
        return group_advantage(value, verdicts.group, baseline=self.baseline, scale=self.scale)
