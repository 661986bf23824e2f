"""CJ-GRPO: every pass of the rollout is replayed, with the terminal reward.

arXiv 2509.23924. Token PPO on what each pass committed, in the canvas of that pass: the exact trace. It is TraceRL's
estimator without merged steps, value model or packing; rewards are z-scored in the group.

Choices (published code): the loss is the mean over the tokens of a pass, then over passes, so that a pass counts the
same whatever it committed, in rollouts of any length (`aggregation`); what follows the end token is trained like the
rest (`scope`). Clip 0.2; old log-probs are the sampler's, which are exact here. The doubling schedule (ASS), which
makes a full replay cheap, and the end-token discount (EOSER) belong to decoders, not to a recipe.

Departs: no KL term by default (we do not know its published weight); log-probs are those of the tempered distribution
that was sampled, the code scores the untempered one. Not built: ASS over blocks (docs/algorithms.md).
"""

from __future__ import annotations

from typing import ClassVar

from rl.recipes.traced import TracedRecipe


class CJGRPO(TracedRecipe, defaults={"scale": "std", "aggregation": "trajectory_step_mean"}):
    noises = ("absorbing", "uniform", "canvas")
    renamed: ClassVar[dict[str, str]] = {
        "step_mean": "aggregation (true is trajectory_step_mean, false trajectory_mean)"
    }
