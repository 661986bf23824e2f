"""TraceRL: PPO on the exact unmasking trace.

Wang et al. 2025, "Revolutionizing Reinforcement Learning Framework for Diffusion Large Language Models"
(arXiv 2509.06949). Every token is scored in the state in which it was revealed; s neighbouring steps may
share a state (`shrink`).

Choices: group advantage without division by the standard deviation, token mean over the batch, old log-probs from the
sampler (they are exact here, so no second forward is needed), no KL.

Departs from the published code in these defaults; its own are options:

* it z-scores rewards, population standard deviation: `scale: std`;
* on block-causal models it divides by the padded response length and by the number of rows: `aggregation: constant`
  divides by the response length and the number of rollouts;
* on full-attention models it averages within a (merged) step, then over the rows, which are the steps of all rollouts:
  `aggregation: step_mean`, with `shrink: 8`;
* it recomputes old log-probs, without the sampler's temperature and filters, which hold here: `old_logprob: recompute`;
* it drops what follows the end token: `scope: answer`. Those tokens stay in the canvas here, as they were sampled;
* its KL of 0.01 is to the old policy: `kl_to: old`, `kl_coef: 0.01`, `kl_estimator: k3`.

The block grid, the terminal block and the token ids are the rollout's (see `rl/estimators/trace_rows.py`).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rl.batch import Tensor
from rl.recipes.base import ValueOptions
from rl.recipes.traced import TracedRecipe


class TraceRL(TracedRecipe):
    noises = ("absorbing", "uniform", "canvas")

    shrink: int = Field(1, ge=1, description="Neighbouring steps that share one scored state; 1 is exact.")
    pack_to: int | None = Field(
        None,
        ge=1,
        description="Score several trajectories per row while they fit into this many tokens, a prompt once for all of "
        "its rollouts; null gives each its own.",
    )
    value: ValueOptions | None = Field(None, description="Train a diffusion value model; null uses none.")
    value_reward: Literal["advantage", "raw"] = Field(
        "advantage", description="What the critic predicts: the group advantage (published) or the raw reward."
    )

    @model_validator(mode="after")
    def _same_states(self) -> TraceRL:
        if self.shrink > 1 and self.old_logprob == "sampler":
            raise ValueError(
                "algorithm.shrink above 1 scores other states than were sampled: set algorithm.old_logprob to recompute"
            )
        if self.scope == "answer" and self.value is not None:
            raise ValueError("algorithm.value learns from every revealed token: set algorithm.scope to canvas")
        return self

    @property
    def layout(self) -> dict[str, Any]:
        return {"shrink": self.shrink, "pack_to": self.pack_to}

    def critic(self) -> ValueOptions | None:
        return self.value

    def outcome(self, advantage: Tensor, reward: Tensor) -> Tensor:
        return advantage if self.value_reward == "advantage" else reward
