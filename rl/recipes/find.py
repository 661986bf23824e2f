"""FIND: policy optimisation of the initial noise, with the denoiser frozen.

Chen et al. 2024, "FIND: Fine-tuning Initial Noise Distribution with Policy Optimization for Diffusion Models" (arXiv
2407.19453, ACM MM). The initial noise of every prompt is drawn from a Gaussian of its own, of the latent's shape: one
decision with the image's reward, a ratio and PPO's clip. It learns nothing about prompts outside the list.

Departs from the published code: the group's mean is the baseline (it has a value network); the regulariser is the exact
KL to the standard Gaussian, which is (m^2 + 2 (s - 1)^2) / 2 to second order where the code has m^2 + (s - 1)^2; the
clip is PPO's (the code clamps the ratio on both sides); all prompts are learned at once.
"""

from __future__ import annotations

from typing import Any

from rl.config import Config
from rl.recipes.images import ImageRecipe


class FIND(ImageRecipe, defaults={"clip_low": 0.2, "clip_high": 0.2, "kl_to": "reference", "kl_coef": 0.02}):
    unused = ()  # a deviation that is learned has an entropy to raise

    def requires(self, config: Config) -> dict[str, Any]:
        return {"model.initial_noise": "learned"}

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        from rl.estimators.initial_noise import initial_noise_rows

        return initial_noise_rows(trajectories, self.reduce)

    def num_decisions(self, trajectory: Any, steps: Any = None) -> int:
        return 1
