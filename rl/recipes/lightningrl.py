"""LightningRL: right answers in few forwards, each reward normalised by itself.

Hu et al. 2026, "LightningRL: Breaking the Accuracy-Parallelism Trade-off of Block-wise dLLMs via Reinforcement
Learning" (arXiv 2603.13319; we read the abstract, and the published code of reward, filter and configuration). Tokens
per forward are counted on every rollout. In a prompt's group reward and speed are z-scored apart and added; the sums
are z-scored over all rollouts that are kept. A prompt is left out when none of its answers is right, or when its
rollouts' speeds differ by less than `min_speed_range`. To the clipped loss comes 0.1 times the negative log-likelihood
of right answers, and a KL of 0.01.

Choices (published code): population standard deviations, mean over a rollout's tokens, then over rollouts.

Departs: the likelihood of right answers is averaged as the policy term is (published: over their own tokens); states
are those of the rollout's blocks (published: training blocks of 4 on rollouts of 32). Speed as a part of
`reward.functions` would count twice.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from rl.batch import DecisionBatch, LossOutput, Tensor
from rl.config import Config
from rl.estimators.base import Verdicts
from rl.recipes.traced import TracedRecipe


class LightningRL(
    TracedRecipe, defaults={"aggregation": "trajectory_mean", "kl_to": "reference", "kl_coef": 0.01, "scale": "std"}
):
    needs_reward: ClassVar[bool] = True

    scale: Literal["std"] = Field("std", description="Reward and speed are z-scored in a prompt's group.")
    baseline: Literal["mean"] = Field("mean", description="Baseline of both.")
    speed_weight: float = Field(1.0, ge=0, description="Weight of the z-scored tokens per forward.")
    nll_coef: float = Field(0.1, ge=0, description="Weight of the negative log-likelihood of right answers.")
    right: float = Field(1.0, description="Reward from which on an answer is right.")
    min_speed_range: float = Field(
        0.01, ge=0, description="Prompts whose rollouts differ by fewer tokens per forward are left out."
    )

    def requires(self, config: Config) -> dict[str, Any]:
        # Groups that are right throughout learn to be fast.
        return {"filters.drop_zero_variance": False}

    def summary(self, trajectory: Any) -> float:
        """Answer tokens per forward."""
        return float(trajectory.stop_length / trajectory.decoder.get("forwards", trajectory.num_steps))

    def advantage(self, verdicts: Verdicts) -> Tensor:
        from rl.advantages import group_advantage

        reward, group = verdicts.reward, verdicts.group
        given = ~reward.isnan()
        speed = reward.new_tensor([*verdicts.summaries]).where(given, reward)
        most, least = (
            reward.new_full((int(group.max()) + 1,), start).scatter_reduce(0, group[given], speed[given], how)
            for start, how in ((-float("inf"), "amax"), (float("inf"), "amin"))
        )
        right = reward.new_zeros(len(most)).index_add(0, group, (reward >= self.right).to(reward.dtype))
        parts = [group_advantage(part, group, self.baseline, self.scale) for part in (reward, speed)]
        total = parts[0] + self.speed_weight * parts[1]
        kept = given & ((right > 0) & (most - least >= self.min_speed_range))[group]
        if kept.any():
            own = total[kept]
            total = (total - own.mean()) / (own.std(correction=0) + 1e-4)
        return total.where(kept, float("nan"))

    def loss(self, batch: DecisionBatch) -> LossOutput:
        found = super().loss(batch)
        assert batch.reward is not None
        right = (batch.reward >= self.right).to(batch.logprob.dtype)
        nll = -right * batch.logprob
        return LossOutput(found.loss + self.nll_coef * nll, {**found.metrics, "nll_right": nll.detach()})
