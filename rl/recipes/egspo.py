"""EGSPO-SA: the most uncertain steps of a rollout are trained, each with an advantage of its own.

Kunde et al. 2026, "Reinforcement Learning for Diffusion LLMs with Entropy-Guided Step Selection and Stepwise
Advantages" (arXiv 2603.12554). Of every rollout the K steps of highest entropy are trained. The credit of step t is (r
+ lambda (r - r_t)) / (1 + lambda), with r the reward of the answer and r_t that of the x0 prediction at step t, a
one-step estimate of the state's value. Its baseline is the mean over the prompt's rollouts at the same rank in their
choice. lambda 0 is EGSPO, the terminal reward at every chosen step.

Choices (published code): rewards minus the mean, not scaled; the committed tokens of a step are its decisions.

Departs: a step's entropy is estimated by the surprisal -log p of what it committed, whose mean it is (samplers record
no entropies); r_t is that of the sampler's own draws (published: greedy ones); ratio and clip are per token
(published: of a step's mean log-prob); we do not know K and lambda: 8 and 1.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rl.batch import Tensor
from rl.config import Config
from rl.estimators.base import Verdicts
from rl.recipes.base import Recipe


class EGSPO(Recipe):
    needs_step_rewards = True

    aggregation: Literal["trajectory_mean"] = Field("trajectory_mean", description="Mean over tokens, steps, rollouts.")
    train_steps: int = Field(8, ge=1, description="Steps trained per rollout (K).")
    step_weight: float = Field(1.0, ge=0, description="lambda: weight of the reward that came after a step.")

    def requires(self, config: Config) -> dict[str, Any]:
        return {"sampler.record_x0": True}

    def summary(self, trajectory: Any) -> Any:
        from rl.estimators.x0_rows import step_summary

        return step_summary(trajectory)

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        from rl.estimators.x0_rows import x0_rows

        return x0_rows(trajectories, model, steps, "committed", False, self.train_steps)

    def num_decisions(self, trajectory: Any, steps: Any = None) -> int:
        from rl.estimators.x0_rows import num_x0_targets

        return num_x0_targets(trajectory, steps, "committed")

    def advantage(self, verdicts: Verdicts) -> Tensor:
        from rl.advantages import rank_advantage, step_values

        assert verdicts.steps is not None
        final, step = step_values(verdicts.steps, "final"), step_values(verdicts.steps, "step")
        value = (final + self.step_weight * (final - step)) / (1 + self.step_weight)
        value[verdicts.reward.isnan()] = float("nan")
        surprisal = value.new_full(value.shape, -1.0)
        for row, summary in zip(surprisal, verdicts.summaries, strict=True):
            row[: len(summary.surprisal)] = row.new_tensor(summary.surprisal)
        order = surprisal.masked_fill(value.isnan(), -1.0).argsort(dim=1, descending=True, stable=True)
        return rank_advantage(value, order, verdicts.group, self.train_steps)
