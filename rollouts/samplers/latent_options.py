"""Every choice a Gaussian sampler is made of, once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class LatentSamplerOptions(BaseModel):
    """A sampler of continuous diffusion: a step rule on the noise schedule the model came with."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["ddim", "ddpm", "flow_sde", "flow_stochastic"] = Field(
        "ddim",
        description="Step rule: DDIM with eta, DDPM's ancestral step, Flow-GRPO's SDE, or diffusers' own stochastic "
        "flow-matching step.",
    )
    num_inference_steps: int = Field(20, ge=1, description="Denoising steps.")
    eta: float = Field(1.0, ge=0, le=1, description="Noise of a DDIM step; 0 is deterministic, 1 has DDPM's variance.")
    noise_level: float = Field(0.7, ge=0, description="a in the flow SDE's noise a sqrt(t / (1 - t)); 0 is the ODE.")
    guidance_scale: float = Field(1.0, ge=0, description="Classifier-free guidance, in rollout and training; 1 is off.")
    min_std: float = Field(
        1e-3, ge=0, description="Steps with a smaller standard deviation have no usable density (DDIM's last step)."
    )
    small_std: Literal["exclude", "floor"] = Field(
        "exclude",
        description="Sample steps below min_std as they are and do not train them, or raise their noise to min_std.",
    )

    @model_validator(mode="after")
    def _floor_is_above_the_bound(self) -> LatentSamplerOptions:
        if self.small_std == "floor" and self.min_std == 0:
            raise ValueError("sampler.small_std floor does nothing with sampler.min_std 0: set min_std above 0")
        return self

    def record(self) -> dict[str, Any]:
        """The settings a trajectory carries; floored steps are ordinary decisions, so only exclusion has a bound."""
        return {**self.model_dump(), "min_std": self.min_std if self.small_std == "exclude" else 0.0}
