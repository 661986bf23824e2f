"""Families of diffusers pipelines: SD 1.x and 2.x, SDXL, SD3, FLUX.1, Sana, Z-Image; `diffusers_qwen.py` has more."""

from __future__ import annotations

import inspect
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


class Transformer(DiffusersPolicy):
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


class StableDiffusion3(Transformer):
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


class Flux(Transformer):
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
        batch, _, height, width = latents.shape
        guidance = latents.new_full((batch,), guidance_scale, dtype=torch.float32) if distilled else None
        output = self.denoiser(
            hidden_states=packed(latents.to(dtype)),
            # diffusers scales the times of this model to [0, 1] before and back to [0, 1000] inside.
            timestep=timesteps.to(dtype) / 1000,
            guidance=guidance,
            pooled_projections=conditioning["pooled_prompt_embeds"].to(dtype),
            encoder_hidden_states=states,
            txt_ids=states.new_zeros(states.shape[1], 3),
            img_ids=self._places(height // 2, width // 2, states),
            return_dict=False,
        )[0]
        return unpacked(output, latents.shape).to(latents.dtype)

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


class Sana(Transformer):
    """Sana: linear attention on the latents of a deep-compression autoencoder, text states of Gemma with a mask.

    Prompts get the pipeline's own instruction before them. Its file describes DPM-Solver++ on a flow, which has no
    density: the flow's own steps between the same times take its place.
    """

    pipeline_class = "SanaPipeline"

    def schedule_options(self, num_inference_steps: int) -> dict[str, Any]:
        config = self.frozen.pipeline.scheduler.config
        if config.get("flow_shift") is None:
            return {"num_inference_steps": num_inference_steps}
        return {"sigmas": np.linspace(1 - 1 / config.num_train_timesteps, 0.0, num_inference_steps + 1)[:-1]}

    def _encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        pipeline = self.frozen.pipeline
        own = inspect.signature(type(pipeline).__call__).parameters["complex_human_instruction"].default
        positive, mask, negative, negative_mask = pipeline.encode_prompt(
            prompts, **self._guided(prompts), complex_human_instruction=own, **self._lengths()
        )
        rows = {"prompt_embeds": positive, "prompt_mask": mask}
        return {**rows, "negative_prompt_embeds": negative, "negative_prompt_mask": negative_mask}

    def _forward(self, latents: torch.Tensor, timesteps: torch.Tensor, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        config = self.denoiser.config
        output = self.denoiser(
            latents,
            encoder_hidden_states=rows["prompt_embeds"],
            encoder_attention_mask=rows["prompt_mask"],
            timestep=timesteps.float() * config.timestep_scale,
            return_dict=False,
        )[0]
        return output.chunk(2, dim=1)[0] if config.out_channels // 2 == config.in_channels else output

    def _scheduler(self, published: Any) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        config = published.config
        if isinstance(published, FlowMatchEulerDiscreteScheduler):
            return published
        if not config.get("use_flow_sigmas"):
            raise ValueError(
                f"model.path: the {type(published).__name__} of this SanaPipeline is not of a flow (use_flow_sigmas)"
            )
        return FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=config.flow_shift)


class ZImage(Transformer):
    """Z-Image: one stream of image patches and text states of Qwen3, of as many tokens as the prompt has.

    Its network is asked with 1 - t and answers with minus the velocity. The pipeline's own guidance_scale is one less
    than `sampler.guidance_scale`, for which 1 is without guidance.
    """

    pipeline_class = "ZImagePipeline"

    def schedule_options(self, num_inference_steps: int) -> dict[str, Any]:
        return {"sigmas": np.linspace(1.0, 1 / num_inference_steps, num_inference_steps), "mu": self._shift()}

    def _encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        length = self.options.max_sequence_length or 512
        rows = {}
        for name, texts in (("", prompts), ("negative_", [self.options.negative_prompt] * len(prompts))):
            # The pipeline writes its chat template into the list it is given.
            found = self.frozen.pipeline._encode_prompt(list(texts), self.device, max_sequence_length=length)
            states = found[0].new_zeros(len(found), length, found[0].shape[1])
            for row, own in zip(states, found, strict=True):
                row[: len(own)] = own
            rows[f"{name}prompt_embeds"] = states
            lengths = torch.tensor([len(own) for own in found], device=states.device)
            rows[f"{name}prompt_mask"] = torch.arange(length, device=states.device) < lengths[:, None]
        return rows

    def _forward(self, latents: torch.Tensor, timesteps: torch.Tensor, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        texts = [own[mask > 0] for own, mask in zip(rows["prompt_embeds"], rows["prompt_mask"], strict=True)]
        frames = list(latents.unsqueeze(2).unbind(0))
        output = self.denoiser(frames, (1000 - timesteps.float()) / 1000, texts, return_dict=False)[0]
        return -torch.stack(list(output)).squeeze(2)

    def _patch(self) -> int:
        return 2


def packed(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, H/2 W/2, 4C], one token for each patch of 2x2."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)


def unpacked(tokens: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """`packed` undone; `shape` [B, C, H, W] of the latents."""
    batch, channels, height, width = shape
    patches = tokens.reshape(batch, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(shape)
