"""MixGRPO: Flow-GRPO whose noise and gradient stay in a window that slides over the steps.

Li et al. 2025, "MixGRPO: Unlocking Flow-based GRPO Efficiency with Mixed ODE-SDE" (arXiv 2507.21802), as in its code:
a window of `window_size` steps draws noise and is trained, all other steps follow the ODE. The window starts at the
noisy end, moves on by `window_stride` every `window_interval` RL steps and begins again after the last place.
Advantages are z-scores of the group, without KL.

Departs from the published code (MixGRPO's train_grpo_flux.py and grpo_states.py, whose update this is): a window is
never cut short at the last steps, and behind the last place it goes to the first (there it stays, without `roll_back`);
`random` draws a place every `window_interval` RL steps (there at every one); no (logprob - old_logprob)^2 / 2; no
window that stays longer at the noisy end; no faster ODE solver behind it; rewards are summed before the advantage.
"""

from __future__ import annotations

import random
from typing import Any, Literal

from pydantic import Field

from rl.config import Config
from rl.recipes.flow_grpo import FlowGRPO


class MixGRPO(FlowGRPO, defaults={"scale": "std", "kl_to": "none", "kl_coef": 0.0}):
    window_size: int = Field(4, ge=1, description="Steps that draw noise and are trained.")
    window_stride: int = Field(1, ge=1, description="Steps by which the window moves on.")
    window_interval: int = Field(25, ge=1, description="RL steps that a window stays in its place.")
    window_order: Literal["progressive", "random"] = Field(
        "progressive", description="From the noisy end on, or a place drawn at random."
    )

    def check(self, config: Config) -> None:
        steps = config.sampler.num_inference_steps
        if config.sampler.sde_window is not None:
            raise ValueError("sampler.sde_window is set by mix_grpo at every RL step: set it to null")
        if self.window_size > steps:
            raise ValueError(
                f"algorithm.window_size ({self.window_size}) must not exceed sampler.num_inference_steps ({steps})"
            )

    def sampler_options(self, options: Any, rl_step: int) -> Any:
        places, turn = options.num_inference_steps - self.window_size + 1, rl_step // self.window_interval
        if self.window_order == "progressive":
            first = turn * self.window_stride % places
        else:
            first = random.Random(f"window {turn}").randrange(places)
        return options.model_copy(update={"sde_window": (first, self.window_size)})
