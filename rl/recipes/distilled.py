"""Recipes that hold the policy to a teacher at every state of its own rollouts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rl.batch import DecisionBatch, LossOutput, Tensor
from rl.config import Config
from rl.estimators.base import Verdicts
from rl.recipes.traced import TracedRecipe


class DistilledRecipe(TracedRecipe, defaults={"aggregation": "trajectory_mean", "scope": "answer"}):
    """The loss of a decision is the divergence to the teacher there (`Scores.kl`), plus a weighted policy gradient."""

    old_logprob: Literal["on_policy", "sampler", "recompute"] = Field(
        "on_policy", description="Denominator of the ratio of the reward's part; distillation alone has no ratio."
    )
    divergence: Literal["forward", "reverse", "cross_entropy"] = Field(
        "forward", description="KL(teacher || policy), KL(policy || teacher), or the cross-entropy under the teacher."
    )
    targets: Literal["masked", "committed"] = Field(
        "masked", description="Tokens taught at a step: all that are masked in its block, or those it committed."
    )
    top: int | None = Field(
        None, ge=1, description="The teacher's likeliest tokens that are told apart; null takes the vocabulary."
    )
    reward_coef: float = Field(
        0.0, ge=0, description="Weight of the clipped policy gradient of the reward beside the distillation."
    )

    @model_validator(mode="after")
    def _own_tokens(self) -> DistilledRecipe:
        if self.reward_coef and self.targets == "masked":
            raise ValueError(
                "algorithm.reward_coef rewards tokens in the states that chose them: set algorithm.targets to committed"
            )
        if self.targets == "masked" and self.old_logprob == "sampler":
            raise ValueError("algorithm.targets masked has no log-probs of the sampler: set old_logprob to on_policy")
        return self

    def requires(self, config: Config) -> dict[str, Any]:
        needs: dict[str, Any] = {"filters.drop_zero_variance": False}
        return needs | ({"train.block_schedule": []} if self.targets == "masked" else {})

    @property
    def needs_group(self) -> bool:
        return self.reward_coef > 0

    @property
    def layout(self) -> dict[str, Any]:
        return {"masked": self.targets == "masked"}

    def trained(self, trajectory: Any) -> Any:
        from rl.estimators.trace_rows import masked_steps, trained_steps

        count = masked_steps if self.targets == "masked" else trained_steps
        return count(trajectory, answer=self.scope == "answer")

    def advantage(self, verdicts: Verdicts) -> Tensor:
        return super().advantage(verdicts) if self.reward_coef else verdicts.reward * 0.0

    def loss(self, batch: DecisionBatch) -> LossOutput:
        assert batch.kl is not None
        # Without a reward advantages are 0, which leaves the entropy bonus and the KL to another policy.
        rewarded = super().loss(batch)
        loss = batch.kl + (self.reward_coef or 1.0) * rewarded.loss
        return LossOutput(loss, rewarded.metrics | {"teacher_kl": batch.kl.detach()})
