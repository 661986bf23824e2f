"""The options of the supervised stages `sft` and `convert`, each once: type, default and one sentence."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rl.sections import OptimizerConfig, Section


class SftOptimizerConfig(OptimizerConfig):
    lr: float = Field(2e-3, gt=0, description="Peak learning rate.")
    betas: tuple[float, float] = Field((0.9, 0.98), description="AdamW betas.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay.")
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = Field(
        "linear", description="Learning-rate schedule."
    )
    warmup_steps: int = Field(100, ge=0, description="Updates of linear warm-up.")


class LevelsConfig(Section):
    """The Beta distribution of masking levels, by its mean and its concentration alpha + beta (SDAR-VL).

    Example: mean [0.5, 0.8], concentration [2, 50]: Beta(1, 1), which is uniform, comes first and Beta(40, 10) last.
    """

    mean: tuple[float, float] = Field(description="Of the first update and of the last; linear between them.")
    concentration: tuple[float, float] = Field(
        description="Of the first update and of the last; a larger one draws levels nearer to the mean."
    )

    @model_validator(mode="after")
    def _is_a_distribution(self) -> LevelsConfig:
        if not (all(0 < m < 1 for m in self.mean) and all(0 < c < math.inf for c in self.concentration)):
            raise ValueError("a mean lies between 0 and 1, and a concentration is above 0")
        return self

    def at(self, progress: float) -> tuple[float, float]:
        """alpha and beta at a share of the stage, 0 at the first update and 1 at the last."""
        mean, both = (a + (b - a) * progress for a, b in (self.mean, self.concentration))
        return mean * both, (1 - mean) * both


class SftConfig(Section):
    steps: int = Field(0, ge=0, description="Supervised updates before RL; 0 skips the stage.")
    batch_size: int = Field(128, ge=1, description="Sequences per update over all ranks.")
    micro_batch_size: int | None = Field(None, ge=1, description="Sequences per forward and rank; null takes all.")
    masking: Literal["random", "semi_ar"] = Field(
        "random",
        description="Mask the whole answer at random, or one block of sampler.block_length with all after it masked.",
    )
    trajectories: str | None = Field(
        None,
        description="File of trajectories (denoise-rl rollout) whose exact traces are imitated instead of answers.",
    )
    loss_weight: Literal["elbo", "effective", "uniform"] = Field(
        "elbo", description="Weight of a masked token: 1/t (MDLM's bound), 1/masked share of its block (SDAR-VL), or 1."
    )
    levels: LevelsConfig | None = Field(
        None, description="Beta distribution of a block's masking level (SDAR-VL's curriculum); null is uniform."
    )
    errors: float = Field(0.0, ge=0, lt=1, description="Share of visible answer tokens made random ones (ReDiff).")
    consistency: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of a masked token's target that is the model's own prediction where more of the answer is "
        "revealed (CDLM).",
    )
    joint: bool = Field(
        False,
        description="Train model.joint_head alone: fit the frozen model's predictions where some masks of an answer "
        "are revealed.",
    )
    merge_steps: int = Field(
        1, ge=1, description="Recorded steps of sft.trajectories that are imitated in one: a decoder of fewer steps."
    )
    drop_condition: float = Field(
        0.1, ge=0, le=1, description="Share of images shown without their prompt, which guidance needs."
    )
    optimizer: SftOptimizerConfig = SftOptimizerConfig()
    checkpoint_every: int = Field(
        0, ge=0, description="Updates between checkpoints of this stage, for run.resume; 0 writes none."
    )
    max_seconds: float | None = Field(None, gt=0, description="Stop the stage after this many seconds.")


class BlockPhase(Section):
    until: float = Field(gt=0, le=1, description="Share of the stage's updates after which this phase is over.")
    lengths: list[int] = Field(min_length=1, description="Block lengths; every update draws one of them.")


class ConvertOptimizerConfig(OptimizerConfig):
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = Field(
        "linear", description="Learning-rate schedule."
    )
    warmup_steps: int = Field(20, ge=0, description="Updates of linear warm-up.")


class ConvertConfig(Section):
    """The stage that makes a diffusion model of an autoregressive one (docs/convert.md)."""

    steps: int = Field(0, ge=0, description="Updates of the conversion before sft; 0 skips the stage.")
    batch_size: int = Field(16, ge=1, description="Texts per update over all ranks.")
    micro_batch_size: int | None = Field(None, ge=1, description="Texts per forward and rank; null takes all.")
    teacher: str | None = Field(
        None,
        description="The frozen autoregressive model: folder, hub name, .gguf file or package:NAME/FILE.gguf; null "
        "takes model.path.",
    )
    data: str = Field(
        "samples",
        description="samples: the teacher's own answers to the task's prompts; task: the task's answers; or a data "
        "file with prompt and answer.",
    )
    num_texts: int = Field(2048, ge=1, description="How many texts samples and task stand for.")
    temperature: float = Field(0.7, ge=0, description="Temperature of the teacher's answers; 0 is greedy.")
    sample_batch_size: int = Field(64, ge=1, description="Answers sampled together.")
    targets: Literal["soft", "hard"] = Field(
        "soft",
        description="Fit the teacher's whole distribution, read causally on the clean text, or the text's tokens.",
    )
    noise: Literal["sdar", "nbdiff", "efficient_dlm"] = Field(
        "sdar",
        description="sdar hides a random share of every block; efficient_dlm later tokens of a block more often; "
        "nbdiff is sdar and the autoregressive loss on clean tokens.",
    )
    position_slope: float = Field(
        1.0, ge=0, description="efficient_dlm: beta in the weight exp(beta (1 - share) i) of token i of a block."
    )
    ar_weight: float = Field(1.0, ge=0, description="nbdiff: weight of the autoregressive loss.")
    loss_weight: Literal["uniform", "elbo"] = Field(
        "uniform", description="Weight 1 on a masked token, or 1/share of its block (the MDLM bound)."
    )
    block_lengths: list[BlockPhase] = Field(
        [], description="Block lengths of the first updates, such as until 0.25 lengths 2 and 4; then the model's own."
    )
    optimizer: ConvertOptimizerConfig = ConvertOptimizerConfig()
    checkpoint_every: int = Field(
        0, ge=0, description="Updates between checkpoints of this stage, for run.resume; 0 writes none."
    )
    max_seconds: float | None = Field(None, gt=0, description="Stop the stage after this many seconds.")

    @field_validator("block_lengths")
    @classmethod
    def _grows(cls, phases: list[BlockPhase]) -> list[BlockPhase]:
        ends = [phase.until for phase in phases]
        if ends != sorted(set(ends)):
            raise ValueError(f"convert.block_lengths: until must grow from phase to phase, got {ends}")
        if any(length < 1 for phase in phases for length in phase.lengths):
            raise ValueError("convert.block_lengths: a block has at least 1 token")
        return phases
