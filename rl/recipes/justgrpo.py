"""JustGRPO: roll out left to right, one token a step, where the likelihood is exact; decode in parallel later.

arXiv 2601.15165. With the order fixed the trace log-prob is the log-prob of the answer, and plain GRPO applies.
Training costs one forward per token of the answer; evaluations may decode otherwise (`eval.sampler`).

Choices (published): rewards z-scored in the group, no KL, no hidden prompt tokens; clip 0.2; mean over the tokens of a
response, what follows its end token in the block included (`scope`), then over responses.

Needs sampler.selector left_most and one step per response token; the run refuses to start otherwise.
"""

from __future__ import annotations

from typing import Any

from rl.config import Config
from rl.recipes.traced import TracedRecipe


class JustGRPO(TracedRecipe, defaults={"scale": "std", "aggregation": "trajectory_mean"}):
    def requires(self, config: Config) -> dict[str, Any]:
        return {
            "sampler.selector": "left_most",
            "sampler.num_inference_steps": config.sampler.gen_length,
            "train.mixed_steps": [],
        }
