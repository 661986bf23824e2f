"""Every choice a masked-diffusion decoder is made of, once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class SamplerOptions(BaseModel):
    """A decoder: quota x token sampler x score x selector, on a block schedule."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gen_length: int = Field(16, ge=1, description="Response tokens to generate.")
    num_inference_steps: int = Field(
        4, ge=1, description="Denoising steps for the whole response, split evenly over its blocks."
    )
    block_length: int | None = Field(
        None,
        ge=1,
        description="Decode in blocks of this many tokens, left to right; null decodes the response at once.",
    )
    temperature: float = Field(1.0, ge=0, description="Token sampling temperature; 0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus filter; 1 keeps every token.")
    top_k: int = Field(0, ge=0, description="Keep the k most likely tokens; 0 keeps all.")
    score: Literal["probability", "margin", "neg_entropy", "random"] = Field(
        "probability", description="What ranks masked positions for revealing."
    )
    score_from: Literal["model", "sampling"] = Field(
        "model",
        description="Distribution the score is read from: the model's (temperature 1, unfiltered) or the sampling one.",
    )
    selector: Literal["top_n", "threshold", "dynamic", "left_most"] = Field(
        "top_n",
        description="Which positions a step reveals: the quota's best, all above threshold (at least one), "
        "above threshold or else the quota's best, or the left-most.",
    )
    threshold: float = Field(0.9, gt=0, le=1, description="Score bound of the threshold and dynamic selectors.")
    record_x0: bool = Field(
        False, description="Also record the full fill of every step, its confidences and log-probs (MDPO)."
    )

    @model_validator(mode="after")
    def _steps_divide(self) -> SamplerOptions:
        self.steps_per_block()
        return self

    def steps_per_block(self, num_inference_steps: int | None = None) -> int:
        """Denoising steps each block gets.

        Raises:
            ValueError: there is no step at all, or the steps or the length do not divide over the blocks.
        """
        steps = self.num_inference_steps if num_inference_steps is None else num_inference_steps
        if steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {steps}")
        if self.block_length is None:
            return steps
        if self.gen_length % self.block_length:
            raise ValueError(
                f"sampler.gen_length ({self.gen_length}) must be a multiple of "
                f"sampler.block_length ({self.block_length})"
            )
        num_blocks = self.gen_length // self.block_length
        if steps % num_blocks:
            raise ValueError(
                f"sampler.num_inference_steps ({steps}) must be a multiple of the {num_blocks} blocks of the response"
            )
        return steps // num_blocks

    def distribution(self) -> dict[str, Any]:
        """The settings a learner needs to score the recorded tokens."""
        return {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


class RelaxedOptions(BaseModel):
    """Sampling with a gradient (`rollouts/samplers/relaxed.py`)."""

    model_config = ConfigDict(extra="forbid")

    relaxed_steps: int = Field(10, ge=1, description="Last steps that the reward's gradient passes through.")
    temperature: float = Field(1.0, gt=0, description="Gumbel-softmax temperature of the relaxed steps.")
    final_temperature: float | None = Field(
        None, gt=0, description="Temperature of the last relaxed step, reached geometrically; null keeps it constant."
    )
    kl_weight: Literal["path", "released"] = Field(
        "path", description="The KL of the two samplers' paths, or the weighting of the released DRAKES code."
    )
    carry_over: Literal["exact", "released"] = Field(
        "exact", description="How undecided mass is kept: as the schedule has it, or as the released code does."
    )
    straight_through: bool = Field(True, description="Make the finished sample one-hot in the forward pass.")
    checkpoint: bool = Field(False, description="Recompute relaxed steps in the backward pass instead of keeping them.")
