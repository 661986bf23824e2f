"""TraFL: trajectory balance, whose optimum is the starting policy tilted by the reward.

Ahmadi et al. 2026, "Beyond Mode-Seeking RL: Trajectory-Balance Post-Training for Diffusion Language Models" (arXiv
2605.13935): the loss of a rollout is (log Z(q) + log pi - log pi_ref - r / beta)^2, log Z(q) learned for a prompt q.
It is 0 where pi is proportional to pi_ref exp(r / beta): modes keep their shares.

log pi is the exact log-prob of the trace, one decision per rollout (published: a surrogate from masked copies, per
token). log Z is a table by prompt, kept in checkpoints: a prompt begins with the value that makes its group's mean
residual 0, and moves by `z_rate` of the way there each time it is met again, which is gradient descent on the loss.

Departs, further, of what we read (abstract, notes, another implementation): a table instead of a network on the prompt,
so prompts that are met once use their group's estimate; rewards are not centred in the group (log Z does it);
the reward is divided by beta, which that implementation multiplies by it. We do not know the published beta.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rl.batch import DecisionBatch, LossOutput, Tensor
from rl.config import Config
from rl.estimators.base import Verdicts
from rl.recipes.traced import TracedRecipe


class TraFL(TracedRecipe):
    aggregation: Literal["trajectory_mean"] = Field("trajectory_mean", description="Mean over rollouts.")  # type: ignore[assignment]
    old_logprob: Literal["sampler"] = Field("sampler", description="What log pi_ref is reckoned from; no ratio.")
    scope: Literal["canvas"] = Field("canvas", description="Everything that was revealed.")
    kl_to: Literal["none"] = Field("none", description="The loss holds to the starting policy by itself.")
    beta: float = Field(1.0, gt=0, description="Temperature of the reward in the law aimed at, pi_ref exp(r / beta).")
    z_rate: float = Field(0.2, gt=0, le=1, description="How far log Z moves to its group's estimate per visit.")

    def requires(self, config: Config) -> dict[str, Any]:
        return {"filters.drop_zero_variance": False}

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def needs_log_ratio(self) -> bool:
        return True

    @property
    def needs_group(self) -> bool:
        return False

    def memory(self) -> Any:
        from rl.prompt_history import PromptNumbers

        return PromptNumbers()

    def summary(self, trajectory: Any) -> Any:
        return trajectory.prompt_ids.tolist(), trajectory.total_logprob

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        from rl.estimators.combine import whole_trajectories

        return whole_trajectories(super().rows(trajectories, model, block, steps, iteration), len(trajectories))

    def num_decisions(self, trajectory: Any, steps: Any = None) -> int:
        return 1

    def advantage(self, verdicts: Verdicts) -> Tensor:
        """[M]: the log-prob that balances each rollout, log pi_ref + r / beta - log Z."""
        assert verdicts.log_ratio is not None
        prompts, drawn = zip(*verdicts.summaries, strict=True)
        aim = verdicts.reward / self.beta
        log_z = verdicts.memory.towards(prompts, aim - verdicts.log_ratio, self.z_rate)
        return verdicts.reward.new_tensor(drawn) - verdicts.log_ratio + aim - log_z

    def loss(self, batch: DecisionBatch) -> LossOutput:
        residual = batch.logprob - batch.advantage
        metrics = {"residual": residual.abs(), "logprob": batch.logprob, "entropy": batch.entropy}
        loss = residual**2 - self.entropy_coef * batch.entropy
        return LossOutput(loss, {name: value.detach() for name, value in metrics.items()})
