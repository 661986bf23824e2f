"""UDM-GRPO: the finished answer is the action, and its states are noised copies of it.

Wang et al. 2026, "UDM-GRPO: Stable and Efficient Group Relative Policy Optimization for Uniform Discrete Diffusion
Models" (arXiv 2604.18518), by its abstract and its code (`pipeline_grpo.py` and `configs/geneval_grpo`). For a few
neighbouring steps k of a rollout of T, with the finished answer x and its noised copy z_k ~ q(z | x) at level k / T,

    log pi_k = mean over the tokens i of log p(x_i | z_k),    loss = mean over k of PPO(log pi_k, A) + kl_coef KL,

p the denoising prediction (the transition to level 1, `rollouts/samplers/uniform.py`). A step is one decision. The
states are those of the supervised stage, not those that the sampler visited, so any sampler will do.

Example: of 4 steps and `num_states` 3, the copies are at levels 0, 1/4, 1/2 (or 1/4, 1/2, 3/4).

Choices (published): 3 states, the first among the 3 earliest steps (Reduced-Step); rewards z-scored in the group,
advantages clamped at 5; k3 KL of 0.05 to the starting policy; clip 1e-4, which acts with `old_logprob: recompute`
alone: the code keeps no old log-probs, so that its ratio is 1.

Departs: levels are linear in k, the paper's model has a metric path; rollouts have no guidance anyway (CFG-Free); the
first state is among the steps that `num_states` are left from; the rollout's temperature and filters hold in p.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from rl.batch import Tensor
from rl.config import Config
from rl.estimators.base import Verdicts
from rl.recipes.base import Recipe


class UDMGRPO(
    Recipe, defaults={"scale": "std", "clip_low": 1e-4, "clip_high": 1e-4, "kl_to": "reference", "kl_coef": 0.05}
):
    noises = ("uniform",)
    redraw = True

    old_logprob: Literal["on_policy", "recompute"] = Field(
        "on_policy", description="Denominator of the ratio; the sampler visited none of these states and has none."
    )
    num_states: int = Field(3, ge=1, description="Neighbouring steps whose states are noised copies of the answer.")
    first_states: int = Field(3, ge=1, description="The first of them is drawn among this many of the earliest steps.")
    advantage_clip: float = Field(5.0, gt=0, description="Bound on the absolute advantage.")

    def check(self, config: Config) -> None:
        steps = min([config.sampler.num_inference_steps, *config.train.mixed_steps])
        if self.num_states > steps:
            raise ValueError(f"algorithm.num_states is {self.num_states}, and rollouts have {steps} steps: lower it")

    def engine_needs(self) -> set[str]:
        return set()

    def levels(self, trajectory: Any, rng: np.random.Generator) -> np.ndarray:
        """float64 [num_states]: signal levels of a rollout's states."""
        steps = (trajectory.num_steps + 1) // 2 if trajectory.sampler.get("corrector") else trajectory.num_steps
        first = rng.integers(min(self.first_states, steps - self.num_states + 1))
        return np.arange(first, first + self.num_states) / steps

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        from rl.estimators.combine import step_means
        from rl.estimators.uniform_rows import noised_answer_rows

        return step_means(noised_answer_rows(trajectories, model, self.levels, iteration))

    def num_decisions(self, trajectory: Any, steps: Any = None) -> int:
        return self.num_states

    def advantage(self, verdicts: Verdicts) -> Tensor:
        return super().advantage(verdicts).clamp(-self.advantage_clip, self.advantage_clip)
