"""d2-StepMerge: the trace in N segments, each scored from the canvas it began with.

Wang et al. 2025, "d2: Improved Techniques for Training Reasoning Diffusion Language Models" (arXiv 2509.21474). The T
denoising passes are cut into N segments of like length; one forward at the start of each gives the log-probs of all
tokens committed in it. N = 1 is d1's estimate without hidden prompt tokens, N >= T the exact trace.

Choices (published): N = 8 (16 for Sudoku), PPO clip and KL; the ratio is between estimates of one kind, so old
log-probs are recomputed. Clip range and KL weight are not in what we read: 0.2 and 0.01. Rewards are z-scored in the
group.

Departs: in block-causal models every block is cut into N segments; what follows the end token is trained like the rest,
since it was decided like the rest (`scope` leaves it out; what the authors do is not in what we read). AnyOrder, d2's
other estimator, needs a model that is causal in any order and is left out.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rl.recipes.options import Recipe
from rl.recipes.trace_options import TraceRecipeOptions


class D2StepMergeOptions(TraceRecipeOptions):
    name: str = Field("d2_stepmerge", description="Recipe name.")
    scale: Literal["none", "std", "batch_std"] = Field("std", description="What advantages are divided by.")
    aggregation: Literal["token_mean", "trajectory_mean", "constant"] = Field(
        "trajectory_mean", description="How decisions are averaged into the loss."
    )
    old_logprob: Literal["recompute", "on_policy"] = Field(
        "recompute", description="Denominator of the ratio; the sampler's log-probs are of other states."
    )
    kl_to: Literal["none", "old", "reference"] = Field("reference", description="What the KL term holds the policy to.")
    kl_coef: float = Field(0.01, ge=0, description="Weight of the KL term.")
    segments: int = Field(8, ge=1, description="Segments of the trajectory (N).")

    def build(self) -> Recipe:
        return self.trace_recipe(segments=self.segments)
