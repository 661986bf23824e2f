"""CJ-GRPO: every pass of the rollout is replayed, with the terminal reward.

arXiv 2509.23924. Token PPO on what each pass committed, in the canvas of that pass: the exact trace. It is TraceRL's
estimator without merged steps, value model or packing; rewards are z-scored in the group.

Choices: mean over the tokens of an answer, then over answers; clip 0.2; old log-probs are the sampler's, which are
exact here. The doubling schedule (ASS), which makes a full replay cheap, and the end-token discount (EOSER) belong to
decoders, not to a recipe.

Departs: no KL term by default (its published weight is not in what we read).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rl.algorithms.options import Recipe, RecipeOptions


class CJGRPOOptions(RecipeOptions):
    name: str = Field("cj_grpo", description="Recipe name.")
    scale: Literal["none", "std", "batch_std"] = Field("std", description="What advantages are divided by.")
    aggregation: Literal["token_mean", "trajectory_mean", "constant"] = Field(
        "trajectory_mean", description="How decisions are averaged into the loss."
    )

    def build(self) -> Recipe:
        from rl.estimators.trace_rows import trace_rows

        return self.token_recipe(trace_rows)
