"""MDPO: every denoising step is rewarded by its own x0 prediction, and the steps that matter are trained.

He et al. 2025, "MDPO: Overcoming the Training-Inference Divide of Masked Diffusion Language Models" (arXiv
2508.13148). The rollout follows the inference schedule (running-confidence remasking included, when the sampler uses
it); the verifier judges the x0 prediction of every step; a step's advantage compares its credit with that of the same
step of the other rollouts; the S steps with the largest advantages are trained, on all draws of their masked positions.

Choices: the paper's credit (improvement plus mean of the later rewards) and z-score per step index, S = T/16 of its
main setting as a number of steps, token weights by confidence, L/|m| on the policy term, k2 KL of 0.02 to the
starting policy. Equal x0 predictions of a prompt are verified once.

Departs from the published code: the S steps are chosen by each rollout's own |A|. There |A| is summed over the rollouts
of a device, and all of them train the same steps; with one rollout a device, as published, that is the same, and here
the choice must not depend on how rollouts are spread over devices. A chosen step of advantage 0 is left out where the
rollout chose others (there the KL acts on it); one optimizer step per batch (there one for every S-th of a batch, of
which one is logged); old log-probs are the sampler's, so further epochs are PPO (there they crash); groups are prompts,
not ranks; temperature and filters of the rollout hold in the loss too. More: docs/algorithms.md.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rl.batch import Tensor
from rl.config import Config
from rl.estimators.base import Verdicts
from rl.recipes.base import Recipe


class MDPO(Recipe, defaults={"kl_to": "reference", "kl_coef": 0.02, "kl_estimator": "k2"}):
    needs_step_rewards = True

    scale: Literal["none", "std"] = Field("std", description="What a step's centred credit is divided by.")
    aggregation: Literal["trajectory_mean"] = Field(
        "trajectory_mean", description="Mean over targets, steps, rollouts."
    )
    credit: Literal["final", "step", "future", "delta", "delta_future"] = Field(
        "delta_future", description="What a step is credited with, from the rewards of all predictions (`step_values`)."
    )
    compare: Literal["index", "canvas"] = Field(
        "index", description="Steps compared with each other: same index in the group, or same canvas in the group."
    )
    train_steps: int = Field(8, ge=1, description="Steps trained per rollout (S).")
    select: Literal["largest", "uniform", "stratified", "surprisal"] = Field(
        "largest", description="Which steps: largest |advantage|, uniform, one per stretch, or by surprisal."
    )
    targets: Literal["masked", "committed"] = Field(
        "masked", description="Draws trained at a step: of all masked positions, or those it committed."
    )
    confidence_weight: bool = Field(True, description="Weigh draws by the sampler's confidence in them.")
    mask_weight: bool = Field(True, description="Weigh a step's policy term by response length / masked positions.")

    def requires(self, config: Config) -> dict[str, Any]:
        return {"sampler.record_x0": True}

    def summary(self, trajectory: Any) -> Any:
        from rl.estimators.x0_rows import step_summary

        return step_summary(trajectory)

    def rows(self, trajectories: Any, model: Any, block: Any = None, steps: Any = None, iteration: int = 0) -> Any:
        from rl.estimators.x0_rows import x0_rows

        return x0_rows(trajectories, model, steps, self.targets, self.confidence_weight, self.train_steps)

    def num_decisions(self, trajectory: Any, steps: Any = None) -> int:
        from rl.estimators.x0_rows import num_x0_targets

        return num_x0_targets(trajectory, steps, self.targets)

    def advantage(self, verdicts: Verdicts) -> Tensor:
        from rl.advantages import mdpo_advantage

        return mdpo_advantage(
            verdicts, self.credit, self.compare, self.scale, self.train_steps, self.select, self.mask_weight
        )
