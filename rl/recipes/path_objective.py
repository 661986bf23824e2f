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

from dataclasses import replace
from typing import Any, Literal

from pydantic import Field, model_validator

from rl.batch import DecisionBatch, LossOutput, Tensor
from rl.config import Config
from rl.estimators.base import Verdicts
from rl.recipes.base import Recipe
from rollouts.samplers.relaxed_options import RelaxedOptions

_GROUPS = ("baseline", "scale", "clip_low", "clip_high", "log_ratio_clamp", "old_logprob")
# Options that an estimator has no use for.
_UNUSED = {
    "pathwise": (*_GROUPS, "aggregation", "entropy_coef"),
    "score_function": ("relaxed",),
    "weighted_regression": (*_GROUPS, "relaxed"),
}


class PathObjective(Recipe):
    """A subclass says `kl_weight`, which is alpha."""

    gradient: Literal["pathwise", "score_function", "weighted_regression"] = Field(
        "pathwise", description="How the gradient of the objective is estimated."
    )
    relaxed: RelaxedOptions = Field(RelaxedOptions(), description="The relaxed rollout of gradient pathwise.")

    @model_validator(mode="after")
    def _fits(self) -> PathObjective:
        if self.kl_to != "none":
            raise ValueError(f"algorithm.kl_to is not the KL of {self.name}, which is along the path: set it to none")
        unused = [n for n in _UNUSED[self.gradient] if getattr(self, n) != type(self).model_fields[n].default]
        if unused:
            raise ValueError(
                f"algorithm.{unused[0]} does nothing with algorithm.gradient {self.gradient}: leave it at its default"
            )
        return self

    def engine_needs(self) -> set[str]:
        return {"gradients"} if self.reward_gradient else {"step_maps", "sampled_logprobs"}

    def requires(self, config: Config) -> dict[str, Any]:
        """A prompt whose rewards are all equal still has a KL; the log-ratio is that of the weights that sampled."""
        return {"filters.drop_zero_variance": False, "rollout.asynchronous": False}

    @property
    def reward_gradient(self) -> bool:
        return self.gradient == "pathwise"

    @property
    def needs_reference(self) -> bool:
        return self.kl_weight > 0

    @property
    def needs_log_ratio(self) -> bool:
        return self.kl_weight > 0

    def gradient_sampler(self, run: Any) -> Any:
        from rl.modalities.soft_text import RelaxedText

        return RelaxedText(run, self.relaxed, with_reference=self.kl_weight > 0)

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        from rl.estimators.trace_rows import trace_rows

        return trace_rows(trajectories, model, block, steps)

    def advantage(self, verdicts: Verdicts) -> Tensor:
        """[M]: reward - alpha * log-ratio, centred in its group, or its softmax weight there at temperature alpha."""
        from rl.advantages import group_softmax

        value = verdicts.reward
        if verdicts.log_ratio is not None:
            value = value - self.kl_weight * verdicts.log_ratio
        if self.gradient == "weighted_regression":
            return group_softmax(value / self.kl_weight, verdicts.group)
        return super().advantage(replace(verdicts, reward=value))

    def loss(self, batch: DecisionBatch) -> LossOutput:
        if self.gradient == "weighted_regression":
            # No ratio: the gradient of -weight * logprob at every update.
            batch = replace(batch, old_logprob=batch.logprob.detach())
        return super().loss(batch)
