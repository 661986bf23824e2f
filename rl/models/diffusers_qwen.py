"""Pipelines that read prompts with a Qwen model: FLUX.2 klein and Qwen-Image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rl.models.diffusers_families import Transformer, packed, unpacked
from rollouts.model_protocol import Conditioning


class Flux2Klein(Transformer):
    """FLUX.2 klein: latents are whole 2x2 patches of its autoencoder's, in units of the batch norm it came with.

    Its pipeline has no negative prompt but the empty one; `model.pipeline.negative_prompt` is read here all the same. A
    distilled checkpoint takes guidance 1 only.
    """

    pipeline_class = "Flux2KleinPipeline"
    lora_layers = (*Transformer.lora_layers, "to_qkv_mlp_proj")

    def schedule_options(self, num_inference_steps: int) -> dict[str, Any]:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        _, height, width = self.latent_shape
        mu = compute_empirical_mu(height * width, num_inference_steps)
        if self.scheduler.config.get("use_flow_sigmas"):
            return {"num_inference_steps": num_inference_steps, "mu": mu}
        return {"sigmas": np.linspace(1.0, 1 / num_inference_steps, num_inference_steps), "mu": mu}

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> torch.Tensor:
        """See `ImagePolicy.predict`.

        Raises:
            ValueError: guidance of a distilled model.
        """
        if guidance_scale != 1 and self.frozen.pipeline.config.get("is_distilled"):
            raise ValueError(f"sampler.guidance_scale is {guidance_scale}: this FLUX.2 model is distilled, set it to 1")
        return super().predict(latents, timesteps, conditioning, guidance_scale)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See `ImagePolicy.decode`."""
        pipeline = self.frozen.pipeline
        vae = pipeline.vae.to(latents.device)
        mean, std = self._statistics()
        inner = pipeline._unpatchify_latents(latents.float() * std + mean)
        return (vae.decode(inner, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    def latents_of(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        pipeline = self.frozen.pipeline
        vae = pipeline.vae.to(self.device)
        mean, std = self._statistics()
        inner = pipeline._patchify_latents(vae.encode(self._pixels(images)).latent_dist.mode())
        return (inner - mean) / std

    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, C, 1, 1] each."""
        vae = self.frozen.pipeline.vae
        mean, variance = (values.view(1, -1, 1, 1) for values in (vae.bn.running_mean, vae.bn.running_var))
        return mean, (variance + vae.config.batch_norm_eps).sqrt()

    def _encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        both = {"prompt_embeds": prompts, "negative_prompt_embeds": [self.options.negative_prompt] * len(prompts)}
        encode, given = self.frozen.pipeline.encode_prompt, {"device": self.device, **self._lengths()}
        return {name: encode(list(texts), **given)[0] for name, texts in both.items()}

    def _forward(self, latents: torch.Tensor, timesteps: torch.Tensor, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        pipeline, states = self.frozen.pipeline, rows["prompt_embeds"]
        output = self.denoiser(
            hidden_states=latents.flatten(2).transpose(1, 2),
            timestep=timesteps.to(latents.dtype) / 1000,
            guidance=None,
            encoder_hidden_states=states,
            txt_ids=pipeline._prepare_text_ids(states).to(latents.device),
            img_ids=pipeline._prepare_latent_ids(latents).to(latents.device),
            return_dict=False,
        )[0]
        return output.transpose(1, 2).reshape(latents.shape)

    def _patch(self) -> int:
        return 2  # of the autoencoder's latents, outside the network

    def _latent_shape(self) -> tuple[int, int, int]:
        height, width = self._size()
        side = self.frozen.pipeline.vae_scale_factor * 2
        return self._channels(), height // side, width // side


class QwenImage(Transformer):
    """Qwen-Image: latents are packed into 2x2 patches inside, and a video autoencoder decodes one frame.

    Prompts are padded to `model.pipeline.max_sequence_length` (512) tokens with a mask, where the pipeline pads to the
    longest of its batch. Its guidance, `true_cfg_scale`, keeps the norm of every patch of the conditional prediction.
    """

    pipeline_class = "QwenImagePipeline"

    def schedule_options(self, num_inference_steps: int) -> dict[str, Any]:
        return {"sigmas": np.linspace(1.0, 1 / num_inference_steps, num_inference_steps), "mu": self._shift()}

    def join(self, without: torch.Tensor, given: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        """See `GuidedPolicy`."""
        joined, conditional = (packed(x) for x in (super().join(without, given, guidance_scale), given))
        norm, wanted = (x.norm(dim=-1, keepdim=True) for x in (joined, conditional))
        return unpacked(joined * (wanted / norm), given.shape)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See `ImagePolicy.decode`."""
        vae = self.frozen.pipeline.vae.to(latents.device)
        mean, std = self._statistics()
        frames = (latents.float() * std + mean).unsqueeze(2)
        return (vae.decode(frames, return_dict=False)[0][:, :, 0] / 2 + 0.5).clamp(0, 1)

    def latents_of(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        vae = self.frozen.pipeline.vae.to(self.device)
        mean, std = self._statistics()
        return (vae.encode(self._pixels(images).unsqueeze(2)).latent_dist.mode()[:, :, 0] - mean) / std

    def _statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, C, 1, 1] each."""
        config = self.frozen.pipeline.vae.config
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return mean.to(self.device), std.to(self.device)

    def _encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        length = self.options.max_sequence_length or 512
        rows = {}
        for name, texts in (("", prompts), ("negative_", [self.options.negative_prompt] * len(prompts))):
            states, mask = self.frozen.pipeline.encode_prompt(
                list(texts), device=self.device, max_sequence_length=length
            )
            mask = states.new_ones(states.shape[:2]) if mask is None else mask  # none of them is padding
            missing = length - states.shape[1]
            rows[f"{name}prompt_embeds"] = torch.nn.functional.pad(states, (0, 0, 0, missing))
            rows[f"{name}prompt_mask"] = torch.nn.functional.pad(mask, (0, missing))
        return rows

    def _forward(self, latents: torch.Tensor, timesteps: torch.Tensor, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        batch, _, height, width = latents.shape
        output = self.denoiser(
            hidden_states=packed(latents),
            timestep=timesteps.to(latents.dtype) / 1000,
            encoder_hidden_states=rows["prompt_embeds"],
            encoder_hidden_states_mask=rows["prompt_mask"] > 0,
            img_shapes=[[(1, height // 2, width // 2)]] * batch,
            attention_kwargs={},
            return_dict=False,
        )[0]
        return unpacked(output, latents.shape)

    def _patch(self) -> int:
        return 2

    def _channels(self) -> int:
        return int(self.denoiser.config.in_channels) // 4
