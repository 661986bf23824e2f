"""Every choice a Gaussian sampler is made of, once."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Name of a cache -> its config and the function that hooks it up, in `diffusers.hooks`.
CACHES = {
    "first_block": ("FirstBlockCacheConfig", "apply_first_block_cache"),
    "mag_cache": ("MagCacheConfig", "apply_mag_cache"),
    "pab": ("PyramidAttentionBroadcastConfig", "apply_pyramid_attention_broadcast"),
    "taylor_seer": ("TaylorSeerCacheConfig", "apply_taylorseer_cache"),
    "faster_cache": ("FasterCacheConfig", "apply_faster_cache"),
}


class LatentSamplerOptions(BaseModel):
    """A sampler of continuous diffusion: a step rule on the noise schedule the model came with."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    kind: Literal["ddim", "ddpm", "flow_sde", "flow_cps", "flow_stochastic", "dpm_solver"] = Field(
        "ddim",
        description="Step rule: DDIM with eta, DDPM's ancestral step, Flow-GRPO's SDE, coefficients-preserving flow "
        "sampling, diffusers' own stochastic flow-matching step, or DPM-Solver++ (no step is a decision).",
    )
    num_inference_steps: int = Field(20, ge=1, description="Denoising steps.")
    eta: float = Field(1.0, ge=0, le=1, description="Noise of a DDIM step; 0 is deterministic, 1 has DDPM's variance.")
    timesteps: tuple[float, ...] | None = Field(
        None, description="Timesteps of the steps, descending, in place of the scheduler's spacing; null: its own."
    )
    first_jump: str | None = Field(
        None,
        description="File of the data's mean and covariance (`DataGaussian.save`): the sampler begins at the first of "
        "sampler.timesteps with the latents that a Gaussian score gives there. Null: with noise.",
    )
    sde_window: tuple[int, int] | None = Field(
        None,
        description="[first, length] of the steps that draw noise; others follow the ODE, no decisions. Null: all.",
    )
    noise_level: float = Field(
        0.7,
        ge=0,
        description="a in the flow SDE's noise a sqrt(t / (1 - t)), or in flow_cps's t' sin(a pi / 2); 0 is the ODE.",
    )
    guidance_scale: float = Field(1.0, ge=0, description="Classifier-free guidance, in rollout and training; 1 is off.")
    guidance_cosine: float | None = Field(
        None,
        description="Cosine of guidance's halves beyond which a rollout goes on without the unconditional one, also "
        "where it is trained (adaptive guidance); null: never.",
    )
    cache: dict[str, Any] | None = Field(
        None,
        description="A cache of diffusers, which makes rollouts approximate: `name` (first_block, mag_cache, pab, "
        "taylor_seer or faster_cache) and fields of its config. Null: none.",
    )
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
        if self.small_std == "floor" and self.kind == "dpm_solver":
            raise ValueError("sampler.small_std floor does nothing with dpm_solver, which draws no noise")
        return self

    @model_validator(mode="after")
    def _steps_are_there(self) -> LatentSamplerOptions:
        steps, times = self.num_inference_steps, self.timesteps
        if self.kind == "flow_cps" and self.noise_level > 1:
            raise ValueError(f"sampler.noise_level ({self.noise_level}) of flow_cps must be at most 1")
        if times is not None:
            if len(times) != steps:
                raise ValueError(
                    f"sampler.timesteps has {len(times)} entries for sampler.num_inference_steps {steps}: make them "
                    "equal (eval.num_inference_steps too, or set eval.sampler.timesteps)"
                )
            if list(times) != sorted(set(times), reverse=True) or times[-1] < 0:
                raise ValueError(f"sampler.timesteps {list(times)} must descend and not be negative")
        if self.first_jump is not None and times is None:
            raise ValueError("sampler.first_jump needs sampler.timesteps, whose first is where the jump ends: set it")
        if self.guidance_cosine is not None and self.guidance_scale == 1:
            raise ValueError("sampler.guidance_cosine does nothing without guidance: set sampler.guidance_scale")
        if self.cache is not None:
            if self.cache.get("name") not in CACHES:
                raise ValueError(f"sampler.cache needs a name, one of {', '.join(CACHES)}: got {self.cache}")
            if self.guidance_cosine is not None:
                raise ValueError("sampler.cache needs one batch for all steps: set sampler.guidance_cosine to null")
        if self.sde_window is not None:
            first, length = self.sde_window
            if first < 0 or length < 1 or first + length > steps:
                raise ValueError(f"sampler.sde_window {[first, length]} must lie in the {steps} steps: [first, length]")
            if self.kind in ("ddpm", "dpm_solver"):
                raise ValueError(
                    "sampler.sde_window needs steps with an ODE: set sampler.kind to ddim (eta 1) or a flow"
                )
        return self

    def record(self) -> dict[str, Any]:
        """The settings a trajectory carries; floored steps are ordinary decisions, so only exclusion has a bound."""
        return {**self.model_dump(mode="json"), "min_std": self.min_std if self.small_std == "exclude" else 0.0}
