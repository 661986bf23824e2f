"""Options shared by the policy-gradient recipes, and the record a recipe is. No torch at import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rl.config import Config
from rl.sections import OptimizerConfig

if TYPE_CHECKING:
    import numpy as np
    import torch

    from rl.batch import DecisionBatch, LossOutput
    from rl.estimators.base import Rows, Verdicts


def revealed(trajectory: Any, steps: np.ndarray | None = None) -> int:
    """Tokens a trajectory revealed: the decisions of a trace."""
    return int(trajectory.is_reveal.sum())


@dataclass
class Recipe:
    """What distinguishes one policy-gradient algorithm from another.

    Attributes:
        rows: the estimator: (trajectories, model, training block length or None for the rollout's, steps) -> what to
            forward and the decisions it scores. `steps` is None for all of them, else a bool [T] per
            trajectory: the steps that have an advantage.
        advantage: verdicts of all ranks -> advantage [M], NaN where there is no reward; or [M, T], one per step, NaN
            where a step is not trained.
        loss: one record of decisions -> per-decision loss and metrics.
        num_decisions: (trajectory, its `steps` or None) -> decisions that `rows` will score, without building them.
        needs_step_rewards: score every step's full fill (`Verdicts.steps`).
        note: trajectory -> something small that `advantage` needs to know of it (`Verdicts.notes`).
        redraw: the estimator is random: `rows` takes one more keyword, `iteration`, the pass over the rollouts, and
            is called anew for every pass.
        needs_reference: keep a frozen copy of the starting policy.
        needs_log_ratio: give the advantage every trajectory's log-ratio to it (`Verdicts.log_ratio`); the loss gets no
            `ref_logprob` then.
        anchor: policy that rows are shown before the first update (`set_anchor(model)`): the one that sampled, or the
            frozen reference.
        splits: index of the RL step -> where rollouts branch (`LatentEngine.splits`), None for modalities
            without branches.
        memory: what a recipe remembers from step to step; its `state()` goes into checkpoints and comes back
            through `restore(state)`. None for most.
        old_logprob: where the ratio's denominator comes from.
        aggregation: how decisions are averaged (`rl/losses/aggregate.py`).
        value: options of a diffusion value model, None for the group advantage alone.
        value_reward: what the critic predicts: the group "advantage" or the "raw" reward.
    """

    rows: Callable[..., Rows]
    advantage: Callable[[Verdicts], torch.Tensor]
    loss: Callable[[DecisionBatch], LossOutput]
    needs_reference: bool
    old_logprob: Literal["sampler", "recompute", "on_policy"]
    aggregation: str
    value: ValueOptions | None = None
    value_reward: Literal["advantage", "raw"] = "advantage"
    num_decisions: Callable[[Any, np.ndarray | None], int] = field(default=revealed)
    needs_step_rewards: bool = False
    note: Callable[[Any], Any] | None = None
    redraw: bool = False
    needs_log_ratio: bool = False
    anchor: Literal["none", "old", "reference"] = "none"
    splits: Callable[[int], Sequence[tuple[int, int]]] | None = None
    memory: Any = None


class ValueOptimizerConfig(OptimizerConfig):
    lr: float = Field(5e-4, gt=0, description="Peak learning rate of the critic.")


class ValueOptions(BaseModel):
    """A diffusion value model (`rl/values`): advantages by GAE over denoising steps."""

    model_config = ConfigDict(extra="forbid")

    optimizer: ValueOptimizerConfig = Field(ValueOptimizerConfig(), description="The critic's optimizer.")
    gamma: float = Field(1.0, ge=0, le=1, description="Discount per denoising step.")
    lam: float = Field(1.0, ge=0, le=1, description="GAE's lambda; 1 is the return minus the value.")
    clip: float = Field(0.2, gt=0, description="How far a value may move from its old one per update.")
    share_backbone: bool = Field(False, description="Put the head on the policy's backbone instead of a copy.")
    coef: float = Field(0.5, gt=0, description="Weight of the value loss when the backbone is shared.")


class AnyRecipeOptions(BaseModel):
    """What every recipe has: a name, a modality, and what takes its steps."""

    model_config = ConfigDict(extra="forbid")
    # What a recipe trains (`rl.registry.MODALITIES`).
    modality: ClassVar[str] = "text"

    name: str = Field(description="Recipe name.")

    def requires(self, config: Config) -> dict[str, Any]:
        """Dotted keys of other sections -> the values without which this recipe cannot run."""
        return {}

    def engine_needs(self) -> set[str]:
        """What the engine must give beside finished samples (keys of `rollouts.engines.base.NEEDS`)."""
        return set()

    def build(self) -> Any:
        """The recipe these options describe: a `Recipe` or a `rl.train.reward_gradient.GradientRecipe`."""
        raise NotImplementedError(f"recipe {self.name} has no build()")


class RecipeOptions(AnyRecipeOptions):
    """Options every policy-gradient recipe has."""

    baseline: Literal["mean", "leave_one_out"] = Field("mean", description="Baseline of the group advantage.")
    scale: Literal["none", "std", "batch_std"] = Field("none", description="What advantages are divided by.")
    aggregation: Literal["token_mean", "trajectory_mean", "constant"] = Field(
        "token_mean", description="How decisions are averaged into the loss."
    )
    clip_low: float = Field(0.2, gt=0, lt=1, description="Lower clip of the probability ratio.")
    clip_high: float = Field(0.2, gt=0, description="Upper clip of the probability ratio.")
    log_ratio_clamp: float = Field(10.0, gt=0, description="Bound on the absolute log-ratio.")
    old_logprob: Literal["sampler", "recompute", "on_policy"] = Field(
        "sampler",
        description="Denominator of the ratio: recorded by the sampler, recomputed before the first update, "
        "or today's own value without gradient.",
    )
    kl_to: Literal["none", "old", "reference"] = Field("none", description="What the KL term holds the policy to.")
    kl_coef: float = Field(0.0, ge=0, description="Weight of the KL term.")
    kl_estimator: Literal["k1", "k2", "k3"] = Field("k3", description="Estimator of the KL term.")
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")

    @model_validator(mode="after")
    def _consistent(self) -> RecipeOptions:
        if self.kl_coef > 0 and self.kl_to == "none":
            raise ValueError("algorithm.kl_coef does nothing with kl_to none: set algorithm.kl_to to old or reference")
        if self.kl_to != "none" and self.kl_coef == 0:
            raise ValueError("algorithm.kl_to does nothing with kl_coef 0: set algorithm.kl_coef above 0")
        if self.kl_to == "old" and self.old_logprob == "on_policy":
            raise ValueError("algorithm.kl_to old is always 0 with old_logprob on_policy: set old_logprob to recompute")
        return self

    def engine_needs(self) -> set[str]:
        return {"step_maps"} | ({"sampled_logprobs"} if self.old_logprob == "sampler" else set())

    def token_recipe(self, rows: Callable[..., Rows]) -> Recipe:
        """Group advantage and clipped loss on an estimator whose decisions are the tokens of the trace."""
        return Recipe(
            rows=rows,
            advantage=self.group_advantage(),
            loss=self.policy_loss(),
            needs_reference=self.kl_to == "reference",
            old_logprob=self.old_logprob,
            aggregation=self.aggregation,
        )

    def policy_loss(self) -> Callable[[DecisionBatch], LossOutput]:
        """The clipped policy-gradient loss with these options."""
        from functools import partial

        from rl.losses.policy_gradient import clipped_policy_loss

        names: list[str] = ["clip_low", "clip_high", "log_ratio_clamp", "kl_coef", "kl_estimator", "kl_to"]
        settings: dict[str, Any] = {name: getattr(self, name) for name in [*names, "entropy_coef"]}
        return partial(clipped_policy_loss, **settings)

    def group_advantage(self) -> Callable[[Verdicts], torch.Tensor]:
        """The group advantage of the final reward with these options."""
        from rl.advantages import group_advantage

        def advantage(verdicts: Verdicts) -> torch.Tensor:
            return group_advantage(verdicts.reward, verdicts.group, baseline=self.baseline, scale=self.scale)

        return advantage
