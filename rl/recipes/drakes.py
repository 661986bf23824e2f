"""DRAKES: reward gradients through a relaxed denoising trajectory, held to the pretrained model by a path KL.

Wang et al. 2024, "Fine-Tuning Discrete Diffusion Models via Reward Optimization with Applications to DNA and Protein
Design" (arXiv 2410.13643). `gradient: pathwise` is the published estimator; the others maximise the same objective.

Departs from the published code in the KL's weight and in how soft states keep their mass (`relaxed.kl_weight`,
`relaxed.carry_over`: `released` restores both), so that alpha is not its 0.001; reference and oracle are frozen;
nothing is sampled or scored twice.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from rl.recipes.path_objective import PathObjective


class DRAKES(PathObjective):
    alpha: float = Field(0.01, ge=0, description="Weight of the KL along the path to the starting policy.")

    @property
    def kl_weight(self) -> float:
        return self.alpha

    @model_validator(mode="after")
    def _temperature(self) -> DRAKES:
        if self.gradient == "weighted_regression" and self.alpha == 0:
            raise ValueError("algorithm.alpha must be above 0 for gradient weighted_regression: it is the temperature")
        return self
