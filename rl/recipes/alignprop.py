"""AlignProp and DRaFT-K: the gradient of a reward, back-propagated through the last K steps of the sampler.

Clark et al. 2024, "Directly Fine-Tuning Diffusion Models on Differentiable Rewards" (arXiv 2309.17400):
`truncation: fixed`. Prabhudesai et al. 2023, "Aligning Text-to-Image Diffusion Models with Reward Backpropagation"
(arXiv 2310.03739): `truncation: uniform`.

The objective is E[reward] - alpha * KL(path of the policy || path of the starting policy), as in DRAKES. Neither paper
has the KL, so alpha is 0; without it the reward is soon over-optimised.

Departs from AlignProp's code: it maximises the reward itself (there the distance to a target is minimised), and K is
drawn for every image from 1 to `gradient_steps` (there one for a batch, from all steps or around the last eight).
DRaFT-LV, which noises the finished image again, is not built.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from rl.config import Config
from rl.recipes.base import AnyRecipe


class AlignProp(AnyRecipe):
    modality: ClassVar[str] = "images"

    gradient_steps: int = Field(
        10, ge=1, description="K, steps at the end of the chain that the gradient goes through."
    )
    truncation: Literal["fixed", "uniform"] = Field(
        "fixed", description="K for every image (DRaFT-K), or drawn between 1 and K for each (AlignProp)."
    )
    recompute: bool = Field(
        False, description="Keep the latents of the K steps only, and run each step again in the backward pass."
    )
    alpha: float = Field(0.0, ge=0, description="Weight of the KL along the path to the starting policy.")

    def requires(self, config: Config) -> dict[str, Any]:
        return {"filters.drop_zero_variance": False}

    @property
    def reward_gradient(self) -> bool:
        return True

    @property
    def kl_weight(self) -> float:
        return self.alpha

    def gradient_sampler(self, run: Any) -> Any:
        from rl.modalities.gradient_images import GradientImages

        return GradientImages(run, self.gradient_steps, self.alpha > 0, self.truncation, self.recompute)
