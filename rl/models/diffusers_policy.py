"""diffusers pipelines as policies: SD 1.x and 2.x, SDXL, SD3 and FLUX behind `ImagePolicy`.

A family says three things: what its text encoders give, how its denoiser is called, and which steps its scheduler
takes. The rest (guidance, LoRA, decoding, folders) is common. Predictions are those of the family's own pipeline; the
pipeline object itself only encodes prompts and is never run.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rl.sections import LoraOptions, PipelineConfig
from rollouts.model_protocol import Conditioning

INDEX = "lora_policy.json"
WEIGHTS = "pytorch_lora_weights.safetensors"


class _Frozen:
    """The pipeline a policy was made from. Copies of the policy share it: text encoders and VAE are never trained."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    def __deepcopy__(self, memo: dict[int, Any]) -> _Frozen:
        return self


class DiffusersPolicy(nn.Module):
    """An `ImagePolicy` on a diffusers pipeline; use `load_diffusers_policy`.

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
        dtype = self.denoiser.dtype
        rows = {name: values.to(dtype) for name, values in conditioning.items()}
        inputs = latents.to(dtype)
        positive = {name: values for name, values in rows.items() if not name.startswith("negative_")}
        if guidance_scale == 1:
            return self._forward(inputs, timesteps, positive).to(latents.dtype)
        both = {name: torch.cat([rows[f"negative_{name}"], values]) for name, values in positive.items()}
        output = self._forward(torch.cat([inputs] * 2), torch.cat([timesteps] * 2), both)
        without, given = output.to(latents.dtype).chunk(2)
        return without + guidance_scale * (given - without)

    def num_evaluations(self, guidance_scale: float) -> int:
        return 1 if guidance_scale == 1 else 2

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """See `ImagePolicy.decode`."""
        vae = self.frozen.pipeline.vae.to(latents.device)
        config = vae.config
        latents = latents.float()
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            mean, std = (latents.new_tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std))
            latents = latents * std / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor + (config.get("shift_factor") or 0.0)
        return (vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)

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
        index = {"base": self.source, "lora": {"rank": config.r, "alpha": config.lora_alpha, "target_modules": targets}}
        (folder / INDEX).write_text(json.dumps(index, indent=2))

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
        own = getattr(pipeline, "default_sample_size", None) or self.denoiser.config.sample_size
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
    )


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


def load_diffusers_policy(
    path: str, options: PipelineConfig, lora: LoraOptions | None = None, seed: int = 0
) -> DiffusersPolicy:
    """A policy from a pipeline's folder or hub name, or from a folder of `save_pretrained`, in eval mode.

    Args:
        lora: may be left out for a policy saved with adapters, which has its own.
        seed: draws the initial weights of new adapters.

    Raises:
        ValueError: the folder is missing or incomplete, or the pipeline is of no known family.
    """
    lora = lora or LoraOptions()
    index = Path(path) / INDEX
    if index.is_file():
        return _load_lora(path, json.loads(index.read_text()), options, lora)
    import diffusers

    try:
        with _quiet():
            name = diffusers.DiffusionPipeline.load_config(path)["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(path, error) from error
    if name not in FAMILIES:
        raise ValueError(f"model.path {path!r} is a {name}: known pipelines are {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    parts: dict[str, Any] = dict.fromkeys(family.without)
    if "safety_checker" in parts:
        parts["requires_safety_checker"] = False
    try:
        with _quiet():
            pipeline = getattr(diffusers, name).from_pretrained(path, dtype=getattr(torch, options.dtype), **parts)
    except (OSError, ValueError, RuntimeError) as error:
        raise _cannot_load(path, error) from error
    torch.manual_seed(seed)
    # A folder is remembered by its full path: the adapters must find it from wherever they are loaded.
    return family(pipeline, options, lora, str(Path(path).resolve()) if Path(path).is_dir() else path).eval()


def _load_lora(path: str, index: dict[str, Any], options: PipelineConfig, lora: LoraOptions) -> DiffusersPolicy:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = Path(path) / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"model.path {path!r} is incomplete: {WEIGHTS} is missing")
    rank, alpha, targets = (index["lora"][name] for name in ("rank", "alpha", "target_modules"))
    if lora.rank not in (0, rank):
        raise ValueError(f"model.lora.rank is {lora.rank}, the adapters in {path!r} have rank {rank}")
    policy = load_diffusers_policy(index["base"], options, LoraOptions(rank=rank, alpha=alpha, targets=targets))
    prefix = f"{policy.denoiser_name}."
    state = {name.removeprefix(prefix): values for name, values in load_file(weights).items()}
    wrong = sorted(policy.lora_state().keys() ^ state.keys())
    if wrong:
        raise ValueError(f"model.path {path!r}: its adapters do not fit {index['base']!r}, {wrong[0]} first")
    set_peft_model_state_dict(policy.denoiser, state)
    return policy


def _cannot_load(path: str, error: Exception) -> ValueError:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(f"model.path {path!r} cannot be loaded as a diffusers pipeline: {first}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' progress bars, its advice on safety checkers, and its use of a retired hub argument."""
    from diffusers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument", category=UserWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
