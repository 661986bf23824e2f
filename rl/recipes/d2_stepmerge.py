"""d2-StepMerge: the trace in N segments, each scored from the canvas it began with.

Wang et al. 2025, "d2: Improved Techniques for Training Reasoning Diffusion Language Models" (arXiv 2509.21474). The T
denoising passes are cut into N segments of like length; one forward at the start of each gives the log-probs of all
tokens committed in it. N = 1 is d1's estimate without hidden prompt tokens, N >= T the exact trace.

Choices (published): N = 8 (16 for Sudoku), PPO clip and KL; the ratio is between estimates of one kind, so old
log-probs are recomputed. We do not know the published clip range and KL weight: 0.2 and 0.01. Rewards are z-scored in
the group.

Departs: in block-causal models every block is cut into N segments; what follows the end token is trained like the rest,
since it was decided like the rest (`scope` leaves it out; we do not know what the authors do). AnyOrder, d2's other
estimator, needs a model that is causal in any order and is left out.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rl.recipes.traced import TracedRecipe


class D2StepMerge(
    TracedRecipe, defaults={"scale": "std", "aggregation": "trajectory_mean", "kl_to": "reference", "kl_coef": 0.01}
):
    old_logprob: Literal["recompute", "on_policy"] = Field(
        "recompute", description="Denominator of the ratio; the sampler's log-probs are of other states."
    )
    segments: int = Field(8, ge=1, description="Segments of the trajectory (N).")

    @property
    def layout(self) -> dict[str, Any]:
        return {"segments": self.segments}
