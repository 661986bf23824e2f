"""FIND: policy optimisation of the initial noise, with the denoiser frozen.

Chen et al. 2024, "FIND: Fine-tuning Initial Noise Distribution with Policy Optimization for Diffusion Models" (arXiv
2407.19453, ACM MM). The initial noise of every prompt is drawn from a Gaussian of its own, of the latent's shape: one
decision with the image's reward, a ratio and PPO's clip. It learns nothing about prompts outside the list.

Departs from the published code: the group's mean is the baseline (it has a value network); the regulariser is the exact
KL to the standard Gaussian, which is (m^2 + 2 (s - 1)^2) / 2 to second order where the code has m^2 + (s - 1)^2; the
clip is PPO's (the code clamps the ratio on both sides); all prompts are learned at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from rl.recipes.image_options import ImageRecipeOptions
from rl.recipes.options import Recipe

if TYPE_CHECKING:
    from rl.config import Config


class FindOptions(ImageRecipeOptions):
    name: str = Field("find", description="Recipe name.")
    clip_low: float = Field(0.2, gt=0, lt=1, description="Lower clip of the ratio, a D-th root with reduce mean.")
    clip_high: float = Field(0.2, gt=0, description="Upper clip of the ratio, a D-th root with reduce mean.")
    kl_to: Literal["none", "old", "reference"] = Field("reference", description="What the KL term holds to.")
    kl_coef: float = Field(0.02, ge=0, description="Weight of the KL term.")

    def requires(self, config: Config) -> dict[str, Any]:
        return {"model.initial_noise": "learned"}

    def build(self) -> Recipe:
        from dataclasses import replace

        from rl.estimators.initial_noise import initial_noise_rows

        def rows(trajectories: Any, model: Any, block: Any, steps: Any) -> Any:
            return initial_noise_rows(trajectories, self.reduce)

        def num_decisions(trajectory: Any, steps: Any = None) -> int:
            return 1

        return replace(self.image_recipe(self.group_advantage()), rows=rows, note=None, num_decisions=num_decisions)
