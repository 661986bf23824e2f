"""TraceRL: PPO on the exact unmasking trace.

Wang et al. 2025, "Revolutionizing Reinforcement Learning Framework for Diffusion Large Language Models"
(arXiv 2509.06949). Every token is scored in the state in which it was revealed; s neighbouring steps may
share a state (`shrink`).

Choices: group advantage without division by the standard deviation, token mean over the batch, old
log-probs from the sampler (they are exact here, so no second forward is needed).

Departs from the published code, which z-scores rewards, divides by the padded response length, recomputes
old log-probs and adds a KL to them of 0.01: each of these is an option below. The block grid, the terminal
block, token ids and the sampling temperature are the rollout's (see `rl/estimators/trace_rows.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from rl.algorithms.options import Recipe, RecipeOptions, ValueOptions

if TYPE_CHECKING:
    from rl.estimators.rows import ScoringRows
    from rollouts.model_protocol import DenoisingModel
    from rollouts.trajectory import TokenTrajectory


def covered(trajectories: Sequence[TokenTrajectory], block: int | None) -> Sequence[TokenTrajectory]:
    """Trajectories whose canvas ends where a training block does; what is added was never revealed."""
    if block is None:
        return trajectories
    return [replace(t, length=-(-t.length // block) * block) for t in trajectories]


class TraceRLOptions(RecipeOptions):
    name: str = Field("tracerl", description="Recipe name.")
    shrink: int = Field(1, ge=1, description="Neighbouring steps that share one scored state; 1 is exact.")
    pack_to: int | None = Field(
        None,
        ge=1,
        description="Score several trajectories per row while they fit into this many tokens; null gives each its own.",
    )
    value: ValueOptions | None = Field(None, description="Train a diffusion value model; null uses none.")
    value_reward: Literal["advantage", "raw"] = Field(
        "advantage", description="What the critic predicts: the group advantage (published) or the raw reward."
    )

    @model_validator(mode="after")
    def _same_states(self) -> TraceRLOptions:
        if self.shrink > 1 and self.old_logprob == "sampler":
            raise ValueError(
                "algorithm.shrink above 1 scores other states than were sampled: set algorithm.old_logprob to recompute"
            )
        return self

    def build(self) -> Recipe:
        from rl.estimators.trace_rows import packed_rows, remask_rows

        def rows(
            trajectories: Sequence[TokenTrajectory], model: DenoisingModel, block: int | None = None, steps: Any = None
        ) -> ScoringRows:
            assert steps is None, "TraceRL trains every step"
            if model.attention == "block_causal":
                return packed_rows(covered(trajectories, block), self.shrink, block, self.pack_to)
            return remask_rows(trajectories, self.shrink, model.logit_shift, pack_to=self.pack_to)

        return Recipe(
            rows=rows,
            advantage=self.group_advantage(),
            loss=self.policy_loss(),
            needs_reference=self.kl_to == "reference",
            old_logprob=self.old_logprob,
            aggregation=self.aggregation,
            value=self.value,
            value_reward=self.value_reward,
        )
