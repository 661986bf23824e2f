"""DiffusionNFT: learn on the forward process, from good samples and away from bad ones.

Zheng et al. 2025, "DiffusionNFT: Online Diffusion Reinforcement with Forward Process" (arXiv 2509.16117). A finished
sample is noised again; the loss weighs the errors of an implicit positive and an implicit negative prediction by r =
clip(A / (2 advantage_clip) + 1/2, 0, 1), A the reward minus its group's mean over the standard deviation of all such
differences (`scale: batch_std`). `kl_to: reference` adds kl_coef times the mean squared distance of the model's output
to the starting policy's (published: 1e-4 beside a loss with a factor of 5, so 2e-5 here).

Departs from the published code: the old policy is the one that sampled (its moving average starts at 0 too), noise
levels are stratified, that distance is off by default, and the loss has no factor of 5, which Adam does not see. We do
not know whether it divides by the spread of differences or, as Flow-GRPO, of rewards: that is `scale: reward_std`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from rl.batch import DecisionBatch, LossOutput
from rl.recipes.images import ImageRecipe


class DiffusionNFT(ImageRecipe, defaults={"scale": "batch_std", "old_logprob": "on_policy"}):
    redraw = True
    unused = ("reduce", "clip_low", "clip_high", "log_ratio_clamp", "old_logprob", "entropy_coef")

    beta: float = Field(1.0, gt=0, description="How far the implicit predictions lie from the old policy's.")
    num_draws: int = Field(4, ge=1, description="Noise levels per sample and pass over the rollouts.")

    @model_validator(mode="after")
    def _no_kl(self) -> DiffusionNFT:
        if self.kl_to == "old" or self.kl_estimator != "exact":
            raise ValueError(
                "algorithm.kl_to of diffusion_nft must be none or reference and its kl_estimator exact: it has no "
                "log-probs"
            )
        return self

    @property
    def anchor(self) -> Literal["none", "old", "reference"]:
        return "old"

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        from rl.estimators.forward_process import NFTRows, forward_rows

        return forward_rows(NFTRows, trajectories, model, self.num_draws, iteration, beta=self.beta)

    def num_decisions(self, trajectory: Any, steps: Any = None) -> int:
        return self.num_draws

    def loss(self, batch: DecisionBatch) -> LossOutput:
        assert batch.negative is not None
        r = (batch.advantage / (2 * self.advantage_clip) + 0.5).clamp(0, 1)
        value = -(r * batch.logprob + (1 - r) * batch.negative) / self.beta
        metrics = {"r": r, "error": -batch.logprob.detach()}
        if self.kl_to == "reference":
            assert batch.kl is not None
            value, metrics["kl"] = value + self.kl_coef * batch.kl, batch.kl.detach()
        return LossOutput(value, metrics)
