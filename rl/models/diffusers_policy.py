"""The part of an `ImagePolicy` on a diffusers pipeline that all families share: guidance, LoRA, decoding, folders.

A family (`diffusers_families.py`) says what its text encoders give, how its denoiser is called, and which steps its
scheduler takes. Predictions are those of the family's own pipeline; the pipeline object only encodes prompts and is
never run.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rl.model_section import LoraOptions, PipelineConfig
from rl.models.pipelines import CACHED, LORA_INDEX
from rollouts.model_protocol import Conditioning

WEIGHTS = "pytorch_lora_weights.safetensors"


class _Frozen:
    """The pipeline a policy was made from. Copies of the policy share it: text encoders and VAE are never trained."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def __deepcopy__(self, memo: dict[int, Any]) -> _Frozen:
        return self


class DiffusersPolicy(nn.Module):
    """An `ImagePolicy` on a diffusers pipeline; use `rl.models.diffusers_load.load_diffusers_policy`.

    Its only parameters are the denoiser's, so that a copy, a checkpoint or a ZeRO partition holds nothing else.
    """

    denoiser: Any
    pipeline_class = ""
    denoiser_name = "unet"
    lora_layers: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0")
    # Components of the pipeline that are not loaded: a safety checker would replace what the reward should judge.
    without: tuple[str, ...] = ("feature_extractor", "image_encoder")

    def __init__(self, pipeline: Any, options: PipelineConfig, lora: LoraOptions, source: str) -> None:
        super().__init__()
        self.options, self.lora, self.source = options, lora, source
        self.frozen = _Frozen(pipeline)
        self.denoiser = getattr(pipeline, self.denoiser_name).eval()
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(name == self.denoiser_name and not lora.rank)
        pipeline.vae.float()
        if lora.rank:
            self._add_lora()
        if options.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing()
        self.scheduler = self._scheduler(pipeline.scheduler)
        self.latent_shape = self._latent_shape()

    # ---- ImagePolicy -----------------------------------------------------------------------------------------------

    @property
    def prediction_type(self) -> str:
        return self.scheduler.config.get("prediction_type", "flow")

    def schedule_options(self, num_inference_steps: int) -> dict[str, Any]:
        """See `ImagePolicy.schedule_options`."""
        return {"num_inference_steps": num_inference_steps}

    @torch.no_grad()
    def encode(self, prompts: Sequence[Any]) -> dict[str, torch.Tensor]:
        """See `ImagePolicy.encode`; float32, [B, ...] each.

        Raises:
            ValueError: a prompt that is not text.
        """
        wrong = next((prompt for prompt in prompts if not isinstance(prompt, str)), None)
        if wrong is not None:
            raise ValueError(f"a diffusers pipeline takes text prompts, the task gave {wrong!r}")
        pipeline, device = self.frozen.pipeline, self.device
        for name, part in pipeline.components.items():
            if name.startswith("text_encoder") and part is not None:
                part.to(device)
        rows = self._encode(list(prompts))
        return {name: values.float() for name, values in rows.items()}

    def predict(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> torch.Tensor:
        """See `ImagePolicy.predict`."""
        if guidance_scale == 1:
            _, positive = self._rows(conditioning)
            return self._forward(latents.to(self.denoiser.dtype), timesteps, positive).to(latents.dtype)
        return self.join(*self.halves(latents, timesteps, conditioning), guidance_scale)

    def join(self, without: torch.Tensor, given: torch.Tensor, guidance_scale: float) -> torch.Tensor:
        """See `GuidedPolicy`."""
        return without + guidance_scale * (given - without)

    def halves(
        self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `GuidedPolicy`."""
        rows, positive = self._rows(conditioning)
        both = {name: torch.cat([rows[f"negative_{name}"], values]) for name, values in positive.items()}
        output = self._forward(torch.cat([latents.to(self.denoiser.dtype)] * 2), torch.cat([timesteps] * 2), both)
        without, given = output.to(latents.dtype).chunk(2)
        return without, given

    def _rows(self, conditioning: Conditioning) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The conditioning in the network's precision, and that of the conditional half alone."""
        rows = {name: values.to(self.denoiser.dtype) for name, values in conditioning.items()}
        return rows, {name: values for name, values in rows.items() if not name.startswith("negative_")}

    def num_evaluations(self, guidance_scale: float) -> int:
        return 1 if guidance_scale == 1 else 2

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See `ImagePolicy.decode`."""
        vae = self.frozen.pipeline.vae.to(latents.device)
        std, scaling, mean = self._units(latents)
        return (vae.decode(latents.float() * std / scaling + mean, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

    def latents_of(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """float32 [B, C, H, W] of uint8 images [height, width, 3]: the mean of the VAE's Gaussian."""
        vae = self.frozen.pipeline.vae.to(self.device)
        encoded = vae.encode(self._pixels(images))  # a deep-compression autoencoder has no distribution
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
        std, scaling, mean = self._units(latents)
        return (latents - mean) * scaling / std

    def _pixels(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """[B, 3, height, width] in [-1, 1]."""
        return torch.from_numpy(np.stack(images)).to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1

    def _units(self, like: torch.Tensor) -> tuple[torch.Tensor | float, float, torch.Tensor | float]:
        """Those of the VAE: latents of the denoiser times the first, over the second, plus the third."""
        config = self.frozen.pipeline.vae.config
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (
                torch.tensor(v, device=like.device)[:, None, None] for v in (config.latents_mean, config.latents_std)
            )
            return std, config.scaling_factor, mean
        return 1.0, config.scaling_factor, config.get("shift_factor") or 0.0

    image_channels = 3

    @property
    def caches(self) -> tuple[str, ...]:
        """Values of `sampler.cache` `name` that this denoiser can have."""
        return CACHED[self.pipeline_class]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self._size()

    # ---- weights ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Predict as the model did before training: adapters off. Only a policy with LoRA can.

        Raises:
            ValueError: every weight is trained, so the start is gone.
        """
        if not self.lora.rank:
            raise ValueError("model.lora.rank is 0: without adapters the weights before training are not kept")
        self.denoiser.disable_adapters()
        try:
            yield
        finally:
            self.denoiser.enable_adapters()

    def lora_state(self) -> dict[str, torch.Tensor]:
        """The adapters in peft's names, without those of the pipeline's parts."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.denoiser)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a folder that `load_diffusers_policy` reads back with equal outputs.

        With LoRA it holds the adapters as any diffusers pipeline loads them (`load_lora_weights`) and the name of the
        pipeline they belong to; without, the whole pipeline.
        """
        if not self.lora.rank:
            self._save_pipeline(self.denoiser, path)
            return
        from diffusers.training_utils import _collate_lora_metadata

        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        type(self.frozen.pipeline).save_lora_weights(
            folder,
            **{f"{self.denoiser_name}_lora_layers": self.lora_state()},
            **_collate_lora_metadata({self.denoiser_name: self.denoiser}),
        )
        config = self.denoiser.peft_config["default"]
        targets = sorted(config.target_modules)
        lora = {"rank": config.r, "alpha": config.lora_alpha, "target_modules": targets, "dora": config.use_dora}
        index = {"base": self.source, "lora": lora}
        (folder / LORA_INDEX).write_text(json.dumps(index, indent=2))

    def save_merged(self, path: str | os.PathLike[str]) -> None:
        """Write the whole pipeline with the adapters merged into its weights: any diffusers program can load it."""
        if not self.lora.rank:
            self._save_pipeline(self.denoiser, path)
            return
        import copy

        merged: Any = copy.deepcopy(self.denoiser)
        merged.fuse_lora()
        merged.unload_lora()
        self._save_pipeline(merged, path)

    def _save_pipeline(self, denoiser: nn.Module, path: str | os.PathLike[str]) -> None:
        pipeline = self.frozen.pipeline
        own = getattr(pipeline, self.denoiser_name)
        pipeline.register_modules(**{self.denoiser_name: denoiser})
        try:
            pipeline.save_pretrained(path)
        finally:
            pipeline.register_modules(**{self.denoiser_name: own})

    def _add_lora(self) -> None:
        config = lora_config(self.lora, self.lora_layers)
        try:
            self.denoiser.add_adapter(config)
        except ValueError as error:
            targets = self.lora.targets or list(self.lora_layers)
            raise ValueError(f"model.lora.targets {targets}: {str(error).splitlines()[0]}") from error

    # ---- what a family decides -------------------------------------------------------------------------------------

    def _encode(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def _forward(self, latents: torch.Tensor, timesteps: torch.Tensor, rows: dict[str, torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError

    def _scheduler(self, published: Any) -> Any:
        return published

    def _size(self) -> tuple[int, int]:
        """Height and width in pixels, checked."""
        pipeline = self.frozen.pipeline
        multiple = pipeline.vae_scale_factor * self._patch()
        own = getattr(pipeline, "default_sample_size", None) or self.denoiser.config.get("sample_size") or 128
        default = own * pipeline.vae_scale_factor
        size = (self.options.height or default, self.options.width or default)
        for name, pixels in zip(("height", "width"), size, strict=True):
            if pixels % multiple:
                raise ValueError(f"model.pipeline.{name} is {pixels}: this pipeline needs a multiple of {multiple}")
        return size

    def _patch(self) -> int:
        return 1

    def _channels(self) -> int:
        return int(self.denoiser.config.in_channels)

    def _latent_shape(self) -> tuple[int, int, int]:
        height, width = self._size()
        scale = self.frozen.pipeline.vae_scale_factor
        return self._channels(), height // scale, width // scale

    def _guided(self, prompts: list[str]) -> dict[str, Any]:
        return {
            "device": self.device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": True,
            "negative_prompt": [self.options.negative_prompt] * len(prompts),
        }


def lora_config(options: LoraOptions, layers: Sequence[str]) -> Any:
    """peft's description of the adapters; `layers` where the options name none."""
    from peft import LoraConfig

    return LoraConfig(
        r=options.rank,
        lora_alpha=options.rank if options.alpha is None else options.alpha,
        init_lora_weights="gaussian",
        target_modules=options.targets or list(layers),
        use_dora=options.dora,
    )
