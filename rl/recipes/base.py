"""A recipe is one class: its options are its fields; its estimator, advantage and loss are its methods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rl.batch import DecisionBatch, LossOutput, Tensor
from rl.config import Config
from rl.estimators.base import Rows, Verdicts
from rl.registry import RECIPES, parse_recipe
from rl.sections import OptimizerConfig

if TYPE_CHECKING:
    import numpy as np

_NAMES = {address: name for name, address in RECIPES.known.items()}


class AnyRecipe(BaseModel):
    """What every recipe has. Its steps are policy gradients (`Recipe`) or reward gradients (`reward_gradient`).

    A subclass gives inherited options other defaults by a keyword: `class MDPO(Recipe, defaults={"scale": "std"})`. The
    default of `name` is what the class is called in a config: its name in `rl.registry.RECIPES`, or its address.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)
    # What a recipe trains (`rl.registry.MODALITIES`).
    modality: ClassVar[str] = "text"
    # The kinds of noise of text models that it trains (`rollouts.model_protocol.noise_of`); "canvas" is uniform noise
    # in one canvas after the other (DiffusionGemma).
    noises: ClassVar[tuple[str, ...]] = ("absorbing",)
    # Score the x0 prediction of every step (`Verdicts.steps`).
    needs_step_rewards: ClassVar[bool] = False
    # Options that had another name once -> their name.
    renamed: ClassVar[dict[str, str]] = {}

    name: str = Field("", description="Recipe name, file.py:Class or package.module:Class.")

    def __init_subclass__(cls, defaults: dict[str, Any] | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)

    @classmethod
    def __pydantic_init_subclass__(cls, defaults: dict[str, Any] | None = None, **rest: Any) -> None:
        address = f"{cls.__module__}:{cls.__qualname__}"
        for option, value in {"name": _NAMES.get(address, address), **(defaults or {})}.items():
            if option not in cls.model_fields:
                raise TypeError(f"recipe {cls.__name__} gives a default to {option!r}, which is none of its options")
            cls.model_fields[option].default = value
        cls.model_rebuild(force=True)

    def __reduce__(self) -> Any:
        """Another process finds the class by its name, wherever its file lies."""
        return parse_recipe, (self.model_dump(),)

    @model_validator(mode="before")
    @classmethod
    def _todays_names(cls, options: Any) -> Any:
        for old, new in cls.renamed.items():
            if old in options:
                raise ValueError(f"algorithm.{old} is called algorithm.{new} now")
        return options

    def requires(self, config: Config) -> dict[str, Any]:
        """Dotted keys of other sections -> the values without which this recipe cannot run."""
        return {}

    def check(self, config: Config) -> None:
        """Raise ValueError where the config does not fit in another way; asked before anything is built."""

    def prepare(self, run: Any) -> None:
        """Load what the recipe needs beside the policy, once, before a run (`rl.train.run.Run`) trains.

        Raises:
            ValueError: it cannot be had, or does not fit the run's model.
        """

    def engine_needs(self) -> set[str]:
        """What the engine must give beside finished samples (keys of `rollouts.engines.base.NEEDS`)."""
        return {"gradients"} if self.reward_gradient else set()

    @property
    def preference_file(self) -> str | None:
        """A file of pairs (`rl/tasks/preferences.py`) that takes the place of rollouts."""
        return None

    @property
    def needs_reference(self) -> bool:
        """Whether to keep a frozen copy of the starting policy."""
        return self.kl_weight > 0

    @property
    def trains_choices(self) -> bool:
        """Whether it scores what the policy chose of its decoder (`sampler.choose`)."""
        return False

    def critic(self) -> ValueOptions | None:
        """Options of a diffusion value model, None for an advantage from rewards alone."""
        return None

    @property
    def needs_group(self) -> bool:
        """Whether a rollout is compared with others of its prompt, so that `train.group_size` 1 would train nothing."""
        return not self.reward_gradient and self.critic() is None

    # --- recipes that back-propagate a reward through the sampler (`rl/train/reward_gradient.py`) ---

    @property
    def reward_gradient(self) -> bool:
        return False

    @property
    def kl_weight(self) -> float:
        """Weight of the KL to the starting policy along the path of the sampler."""
        return 0.0

    def gradient_sampler(self, run: Any) -> Any:
        """What samples with a gradient in a run (`rl.train.run.Run`): a `rl.modalities.gradient.GradientSampler`."""
        raise NotImplementedError(f"recipe {self.name} has no gradient_sampler")


class Recipe(AnyRecipe):
    """A policy gradient: group advantage and clipped loss. A subclass brings the estimator, and what it changes.

    Shape legend: M rollouts of a step over all ranks, T denoising steps.
    """

    # The estimator is random: every pass over the rollouts has rows of its own.
    redraw: ClassVar[bool] = False
    # See `rl.losses.policy_gradient.clipped_policy_loss`.
    linear_gain: ClassVar[bool] = False
    # The loss sees each decision's reward (`DecisionBatch.reward`).
    needs_reward: ClassVar[bool] = False

    baseline: Literal["mean", "leave_one_out"] = Field("mean", description="Baseline of the group advantage.")
    scale: Literal["none", "std", "reward_std", "batch_std"] = Field(
        "none",
        description="What advantages are divided by: the standard deviation of the group's rewards, of all rewards "
        "of the step (reward_std), or of all advantages of the step (batch_std).",
    )
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
    def _consistent(self) -> Recipe:
        if self.kl_coef > 0 and self.kl_to == "none":
            raise ValueError("algorithm.kl_coef does nothing with kl_to none: set algorithm.kl_to to old or reference")
        if self.kl_to != "none" and self.kl_coef == 0:
            raise ValueError("algorithm.kl_to does nothing with kl_coef 0: set algorithm.kl_coef above 0")
        if self.kl_to == "old" and self.old_logprob == "on_policy":
            raise ValueError("algorithm.kl_to old is always 0 with old_logprob on_policy: set old_logprob to recompute")
        return self

    def engine_needs(self) -> set[str]:
        return {"step_maps"} | ({"sampled_logprobs"} if self.old_logprob == "sampler" else set())

    @property
    def needs_reference(self) -> bool:
        return self.kl_to == "reference"

    @property
    def needs_log_ratio(self) -> bool:
        """Whether advantages need `Verdicts.log_ratio`; the loss gets no `ref_logprob` then."""
        return False

    @property
    def anchor(self) -> Literal["none", "old", "reference"]:
        """Policy that rows are shown before the first update (`rows.set_anchor(model)`); "old" sampled them."""
        return "none"

    def outcome(self, advantage: Tensor, reward: Tensor) -> Tensor:
        """[M]: what a critic predicts, given the advantages and the rewards."""
        return advantage

    def sampler_options(self, options: Any, rl_step: int) -> Any:
        """The sampler of an RL step's rollouts: the config's, or a copy of it that differs in what learning takes."""
        return options

    def branch_points(self, rl_step: int) -> list[tuple[int, int]]:
        """(denoising step, branches): before this step every rollout goes on as so many (`LatentEngine`)."""
        return []

    def memory(self) -> Any:
        """What `advantage` remembers from step to step, empty: `Verdicts.memory`, with `state()` and `restore(state)`.

        It belongs to a run and goes into its checkpoints; None for most recipes.
        """
        return None

    def look_at(self, run: Any, rollouts: Any) -> None:
        """See a step's rollouts on this rank (`rl.train.rollouts.ScoredRollouts`) before anything is made of them.

        It may clear entries of their `keep` and `counted`, and add numbers to `filtered`.
        """

    def summary(self, trajectory: Any) -> Any:
        """Something small that `advantage` needs to know of a trajectory (`Verdicts.summaries`)."""
        return None

    def rows(
        self,
        trajectories: Sequence[Any],
        model: Any,
        block: int | None = None,
        steps: Sequence[np.ndarray] | None = None,
        iteration: int = 0,
    ) -> Rows:
        """The estimator: what to forward, and the decisions it scores.

        Args:
            block: training block length, None for the rollout's.
            steps: bool [T] per trajectory, the steps that have an advantage; None for all of them.
            iteration: pass over the rollouts, for a recipe that draws anew (`redraw`).
        """
        raise NotImplementedError(f"recipe {self.name} has no rows()")

    def num_decisions(self, trajectory: Any, steps: np.ndarray | None = None) -> int:
        """Decisions that `rows` will score, without building them: the tokens that were revealed."""
        return int(trajectory.is_reveal.sum())

    def advantage(self, verdicts: Verdicts) -> Tensor:
        """[M], NaN where there is no reward; or [M, T], one per step, NaN where a step is not trained."""
        from rl.advantages import group_advantage

        if not self.needs_group and len(verdicts.group.unique()) == len(verdicts.group):
            # Lone rollouts: the critic's value is the baseline.
            return verdicts.reward
        return group_advantage(verdicts.reward, verdicts.group, self.baseline, self.scale)

    def loss(self, batch: DecisionBatch) -> LossOutput:
        from rl.losses.policy_gradient import clipped_policy_loss

        return clipped_policy_loss(
            batch,
            clip_low=self.clip_low,
            clip_high=self.clip_high,
            log_ratio_clamp=self.log_ratio_clamp,
            kl_to=self.kl_to,
            kl_coef=self.kl_coef,
            kl_estimator=self.kl_estimator,
            entropy_coef=self.entropy_coef,
            linear_gain=self.linear_gain,
        )


class ValueOptimizerConfig(OptimizerConfig):
    lr: float = Field(5e-4, gt=0, description="Peak learning rate of the critic.")


class ValueOptions(BaseModel):
    """A diffusion value model (`rl/values`): advantages by GAE over denoising steps."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    optimizer: ValueOptimizerConfig = Field(ValueOptimizerConfig(), description="The critic's optimizer.")
    gamma: float = Field(1.0, ge=0, le=1, description="Discount per denoising step.")
    lam: float = Field(1.0, ge=0, le=1, description="GAE's lambda; 1 is the return minus the value.")
    clip: float = Field(0.2, gt=0, description="How far a value may move from its old one per update.")
    share_backbone: bool = Field(False, description="Put the head on the policy's backbone instead of a copy.")
    coef: float = Field(0.5, gt=0, description="Weight of the value loss when the backbone is shared.")
