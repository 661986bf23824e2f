"""DDPO: policy gradient on denoising steps, with importance ratios and per-prompt statistics.

Black et al. 2023, "Training Diffusion Models with Reinforcement Learning" (arXiv 2305.13301), the importance-sampling
estimator: every step of a rollout is an action with the final reward, z-scored by prompt, and PPO's clip.

Departs from the published code: statistics cover whole RL steps instead of the last 16 or 32 rewards, trajectories
are float32 and never re-rounded, steps without a density are left out. `progressive` adds B²-DiffuRL's backward
progressive training and nothing else; `kl_to: reference` with a `kl_coef` is the regulariser of DPOK (`dpok`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from rl.recipes.image_options import IntervalOptions, on_steps
from rl.recipes.options import Recipe

if TYPE_CHECKING:
    import torch

    from rl.estimators.base import Verdicts


class DdpoOptions(IntervalOptions):
    name: str = Field("ddpo", description="Recipe name.")
    progressive: bool = Field(False, description="Train the last steps first and extend to all of them.")
    history: int = Field(8, ge=0, description="Earlier RL steps whose rewards of a prompt count in its statistics.")
    min_count: int = Field(16, ge=2, description="Rewards a prompt needs for statistics of its own.")

    def build(self) -> Recipe:
        from rl.prompt_history import PromptHistory

        history = PromptHistory(self.history, self.min_count)

        def advantage(verdicts: Verdicts) -> torch.Tensor:
            z = history.z_scores(verdicts.reward, [n.prompt for n in verdicts.notes])
            return on_steps(z, verdicts, self.first_step(verdicts.rl_step, len(verdicts.notes[0].decides)))

        return self.image_recipe(advantage, memory=history)


class DpokOptions(DdpoOptions):
    """Fan et al. 2023, DPOK (arXiv 2305.16381): the same with the exact KL to the starting policy at every step.

    Its value network is left out: per-prompt statistics are the baseline.
    """

    name: str = Field("dpok", description="Recipe name.")
    kl_to: str = Field("reference", description="What the KL term holds the policy to.")  # type: ignore[assignment]
    kl_coef: float = Field(0.01, gt=0, description="Weight of the KL term.")
