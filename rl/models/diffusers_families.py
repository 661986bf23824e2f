"""Families of diffusers pipelines: SD 1.x and 2.x, SDXL, SD3 and FLUX."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rl.models.diffusers_policy import DiffusersPolicy
from rollouts.model_protocol import Conditioning


class StableDiffusion(DiffusersPolicy):
    """SD 1.x and 2.x: a UNet that attends to CLIP's text states."""

    pipeline_class = "StableDiffusionPipeline"
    without: tuple[str, ...] = ("safety_checker", *DiffusersPolicy.without)

    def _encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        positive, negative = self.frozen.pipeline.encode_prompt(prompts, **self._guided(prompts))
        return {"prompt_embeds": positive, "negative_prompt_embeds": negative}

    def _forward(self, latents: torch.Tensor, timesteps: torch.Tensor, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.denoiser(latents, timesteps, encoder_hidden_states=rows["prompt_embeds"], return_dict=False)[0]

    def _scheduler(self, published: Any) -> Any:
        """DDIM on the published noise schedule. Its file describes a solver (PNDM, Euler) that has no density.

        Where the file is silent, what those solvers do is kept: no clipping of latents, which know no bounds, and the
        first alpha, not 1, after the last step.
        """
        from diffusers import DDIMScheduler

        config = dict(published.config)
        silent = {name: False for name in ("clip_sample", "set_alpha_to_one") if name not in config}
        return DDIMScheduler.from_config(config, **silent)


class StableDiffusionXL(StableDiffusion):
    """SDXL: two CLIP encoders, a pooled text embedding, and the image's size and crop as conditions."""

    pipeline_class = "StableDiffusionXLPipeline"
    without = DiffusersPolicy.without

    def _encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        positive, negative, pooled, negative_pooled = self.frozen.pipeline.encode_prompt(
            prompts, **self._guided(prompts)
        )
        rows = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
        return {**rows, "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}

    def _forward(self, latents: torch.Tensor, timesteps: torch.Tensor, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        size = self._size()
        # Original size, top-left corner of the crop, target size: an image that was never cropped.
        time_ids = latents.new_tensor([*size, 0, 0, *size]).expand(len(latents), -1)
        return self.denoiser(
            latents,
            timesteps,
            encoder_hidden_states=rows["prompt_embeds"],
            added_cond_kwargs={"text_embeds": rows["pooled_prompt_embeds"], "time_ids": time_ids},
            return_dict=False,
        )[0]


class _Transformer(DiffusersPolicy):
    """Flow matching on a transformer of image patches and text tokens."""

    denoiser_name = "transformer"
    lora_layers = (*DiffusersPolicy.lora_layers, "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")

    def _patch(self) -> int:
        return int(self.denoiser.config.patch_size)

    def _shift(self) -> float:
        """mu of resolution-dependent shifting, linear in the number of image tokens (Esser et al. 2024, 5.3.2)."""
        config = self.scheduler.config
        _, height, width = self.latent_shape
        tokens = (height // self._patch()) * (width // self._patch())
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return config.base_shift + slope * (tokens - config.base_image_seq_len)

    def _lengths(self) -> dict[str, int]:
        length = self.options.max_sequence_length
        return {} if length is None else {"max_sequence_length": length}


class StableDiffusion3(_Transformer):
    """SD3 and SD3.5: two CLIP encoders and T5."""

    pipeline_class = "StableDiffusion3Pipeline"

    def schedule_options(self, num_inference_steps: int) -> dict[str, Any]:
        options: dict[str, Any] = {"num_inference_steps": num_inference_steps}
        if self.scheduler.config.get("use_dynamic_shifting"):
            options["mu"] = self._shift()
        return options

    def _encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        empty = {"prompt_2": None, "prompt_3": None}
        positive, negative, pooled, negative_pooled = self.frozen.pipeline.encode_prompt(
            prompts, **empty, **self._guided(prompts), **self._lengths()
        )
        rows = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
        return {**rows, "pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": negative_pooled}

    def _forward(self, latents: torch.Tensor, timesteps: torch.Tensor, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.denoiser(
            hidden_states=latents,
            timestep=timesteps.to(latents.dtype),
            encoder_hidden_states=rows["prompt_embeds"],
            pooled_projections=rows["pooled_prompt_embeds"],
            return_dict=False,
        )[0]


class Flux(_Transformer):
    """FLUX.1: CLIP's pooled embedding and T5's states; latents are packed into 2x2 patches inside `predict`.

    A guidance-distilled model (dev) is told `guidance_scale` and runs once per step, whatever the scale; one that is
    not (schnell) was trained to do without guidance and takes 1 only.
    """

    pipeline_class = "FluxPipeline"

    def schedule_options(self, num_inference_steps: int) -> dict[str, Any]:
        if self.scheduler.config.get("use_flow_sigmas"):
            return {"num_inference_steps": num_inference_steps, "mu": self._shift()}
        sigmas = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        return {"sigmas": sigmas, "mu": self._shift()}

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> torch.Tensor:
        """See `ImagePolicy.predict`.

        Raises:
            ValueError: guidance of a model that has none.
        """
        distilled = self.denoiser.config.guidance_embeds
        if not distilled and guidance_scale != 1:
            raise ValueError(
                f"sampler.guidance_scale is {guidance_scale}: this FLUX model has no guidance, set it to 1"
            )
        dtype = self.denoiser.dtype
        states = conditioning["prompt_embeds"].to(dtype)
        batch, channels, height, width = latents.shape
        patches = latents.to(dtype).reshape(batch, channels, height // 2, 2, width // 2, 2)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)
        guidance = latents.new_full((batch,), guidance_scale, dtype=torch.float32) if distilled else None
        output = self.denoiser(
            hidden_states=patches,
            # diffusers scales the times of this model to [0, 1] before and back to [0, 1000] inside.
            timestep=timesteps.to(dtype) / 1000,
            guidance=guidance,
            pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
            encoder_hidden_states=states,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=self._places(height // 2, width // 2, states),
            return_dict=False,
        )[0]
        output = output.reshape(batch, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return output.reshape(latents.shape).to(latents.dtype)

    def num_evaluations(self, guidance_scale: float) -> int:
        return 1

    def _encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        states, pooled, _ = self.frozen.pipeline.encode_prompt(
            prompts, None, device=self.device, num_images_per_prompt=1, **self._lengths()
        )
        return {"prompt_embeds": states, "pooled_prompt_embeds": pooled}

    def _patch(self) -> int:
        return 2  # packed outside the network, whose own patches are single entries

    def _channels(self) -> int:
        return int(self.denoiser.config.in_channels) // 4

    @staticmethod
    def _places(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
        """[rows * columns, 3]: (0, row, column) of every patch."""
        places = like.new_zeros(rows, columns, 3)
        places[..., 1] = torch.arange(rows, device=like.device)[:, None]
        places[..., 2] = torch.arange(columns, device=like.device)[None, :]
        return places.reshape(-1, 3)


FAMILIES = {family.pipeline_class: family for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux)}
