"""DDPO: policy gradient on denoising steps, with importance ratios and per-prompt statistics.

Black et al. 2023, "Training Diffusion Models with Reinforcement Learning" (arXiv 2305.13301), the importance-sampling
estimator: every step of a rollout is an action with the final reward, z-scored by prompt (population standard deviation
plus 1e-6), and PPO's clip.

Departs from the published code: statistics cover whole RL steps instead of the last 16 or 32 rewards; a prompt with
fewer than `min_count` rewards takes the statistics of all prompts of the step with their remembered rewards, instead of
those of this step's rewards alone; equal rewards have advantage 0; trajectories are float32 and never re-rounded, steps
without a density are left out. `progressive` adds B²-DiffuRL's backward progressive training and nothing else;
`kl_to: reference` with a `kl_coef` is the regulariser of DPOK (`dpok`).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rl.batch import Tensor
from rl.estimators.base import Verdicts
from rl.recipes.images import IntervalRecipe, on_steps


class DDPO(IntervalRecipe, defaults={"progressive": False}):
    min_count: int = Field(16, ge=2, description="Rewards a prompt needs for statistics of its own.")

    @property
    def needs_group(self) -> bool:
        return False

    def memory(self) -> Any:
        from rl.prompt_history import PromptHistory

        return PromptHistory(self.history, self.min_count, correction=0, eps=1e-6)

    def advantage(self, verdicts: Verdicts) -> Tensor:
        z = verdicts.memory.z_scores(verdicts.reward, [n.prompt for n in verdicts.summaries])
        first = self.first_step(verdicts.rl_step, len(verdicts.summaries[0].decides))
        return self.clamped(on_steps(z, verdicts, first))


class DPOK(DDPO, defaults={"kl_to": "reference"}):
    """Fan et al. 2023, DPOK (arXiv 2305.16381): the same with an exact KL to the starting policy at every step.

    Departs from the published code: per-prompt z-scores stand for its value network and its reward weight of 10 (1000
    for many prompts); the clip is PPO's (it clamps the ratio on both sides); rollouts are used once, it keeps a replay
    buffer.
    """

    kl_coef: float = Field(0.01, gt=0, description="Weight of the KL term.")
