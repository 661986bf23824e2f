"""What the recipes share that maximise E[reward] - alpha * KL(path of the policy || path of the starting policy).

With one position per step the optimum is the law p_start(x) exp(reward / alpha) / Z. Three estimators of the gradient:

* `pathwise`: Gumbel-softmax over the last steps, a differentiable reward. Biased, since the soft path is another
  sampler than the hard one.
* `score_function`: reward - alpha * log-ratio of the path, in place of the reward, on exact trace log-probs. Unbiased
  where the order of reveals does not depend on the model (`sampler.score` random, or selector left_most); any reward.
* `weighted_regression`: cross-entropy on sampled paths, weighted by the group's softmax of reward / alpha - log-ratio
  (MDNS, arXiv 2508.10684, and TR2-D2, arXiv 2509.25171, do so off-policy with a buffer).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from rl.recipes.options import Recipe, RecipeOptions
from rl.recipes.tracerl import TraceRLOptions
from rollouts.samplers.options import RelaxedOptions

if TYPE_CHECKING:
    import torch

    from rl.config import Config
    from rl.estimators.base import Verdicts
    from rl.train.reward_gradient import GradientRecipe

_GROUPS = ("baseline", "scale", "clip_low", "clip_high", "log_ratio_clamp", "old_logprob")
# Options that an estimator has no use for.
_UNUSED = {
    "pathwise": (*_GROUPS, "aggregation", "entropy_coef"),
    "score_function": ("relaxed",),
    "weighted_regression": (*_GROUPS, "relaxed"),
}


class PathObjectiveOptions(RecipeOptions):
    gradient: Literal["pathwise", "score_function", "weighted_regression"] = Field(
        "pathwise", description="How the gradient of the objective is estimated."
    )
    relaxed: RelaxedOptions = Field(RelaxedOptions(), description="The relaxed rollout of gradient pathwise.")

    @property
    def kl_weight(self) -> float:
        """alpha."""
        raise NotImplementedError(f"recipe {self.name} has no kl_weight")

    @model_validator(mode="after")
    def _fits(self) -> PathObjectiveOptions:
        if self.kl_to != "none":
            raise ValueError(f"algorithm.kl_to is not the KL of {self.name}, which is along the path: set it to none")
        unused = [n for n in _UNUSED[self.gradient] if getattr(self, n) != type(self).model_fields[n].default]
        if unused:
            raise ValueError(
                f"algorithm.{unused[0]} does nothing with algorithm.gradient {self.gradient}: leave it at its default"
            )
        return self

    def engine_needs(self) -> set[str]:
        return {"gradients"} if self.gradient == "pathwise" else {"step_maps", "sampled_logprobs"}

    def requires(self, config: Config) -> dict[str, Any]:
        """A prompt whose rewards are all equal still has a KL; the log-ratio is that of the weights that sampled."""
        return {"filters.drop_zero_variance": False, "rollout.asynchronous": False}

    def build(self) -> Recipe | GradientRecipe:  # type: ignore[override]
        alpha = self.kl_weight
        if self.gradient == "pathwise":
            from rl.modalities.soft_text import RelaxedText
            from rl.train.reward_gradient import GradientRecipe

            sampler = partial(RelaxedText, options=self.relaxed, with_reference=alpha > 0)
            return GradientRecipe(sampler=sampler, kl_coef=alpha)
        trace = TraceRLOptions().build()
        return Recipe(
            rows=trace.rows,
            advantage=self.advantage,
            loss=self.policy_loss(),
            needs_reference=alpha > 0,
            needs_log_ratio=alpha > 0,
            # Regression has no ratio: the gradient of -weight * logprob at every update.
            old_logprob="on_policy" if self.gradient == "weighted_regression" else self.old_logprob,
            aggregation=self.aggregation,
        )

    def advantage(self, verdicts: Verdicts) -> torch.Tensor:
        """[M]: reward - alpha * log-ratio, centred in its group, or its softmax weight there at temperature alpha."""
        from rl.advantages import group_advantage, group_softmax

        value = verdicts.reward
        if verdicts.log_ratio is not None:
            value = value - self.kl_weight * verdicts.log_ratio
        if self.gradient == "weighted_regression":
            return group_softmax(value / self.kl_weight, verdicts.group)
        return group_advantage(value, verdicts.group, baseline=self.baseline, scale=self.scale)
