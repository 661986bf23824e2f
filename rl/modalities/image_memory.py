"""What an image model needs of memory; `rl.train.memory` has the states, and the lines.

Activations are counted on the meta device: the denoiser that `model.backbone` describes, with its adapters, predicts
a micro-batch, and autograd is asked what it keeps. Text encoders, the VAE and the forwards of sampling, which keep
nothing, come on top.
"""

from __future__ import annotations

from typing import Any

import torch

from rl.config import Config
from rl.modalities.memory import ModelMemory, num_parameters, saved_bytes
from rl.models.class_policy import network_class

CLIP_TOKENS = 77
T5_TOKENS = 256  # of SD3, unless model.pipeline.max_sequence_length asks for fewer


def build_denoiser(config: Config, device: str = "meta") -> Any:
    """The network of `model.backbone`, with the adapters of `model.lora`.

    Raises:
        ValueError: the config describes none.
    """
    settings = dict(config.model.backbone)
    if not settings:
        raise ValueError(
            "model.backbone must describe the denoiser for --plan (model_type UNet2DConditionModel, its sizes); with "
            "model.path set it builds nothing"
        )
    network = network_class(settings.pop("model_type", "mlp_denoiser"))
    # Any number of classes: their embeddings are a thousandth of a model.
    defaults = {} if config.model.path else {"num_class_embeds": 11}
    with torch.device(device):
        model = network(**{**defaults, **settings})
        options = config.model.lora
        if options.rank:
            from rl.models.diffusers_policy import DiffusersPolicy, lora_config

            model.requires_grad_(False)
            model.add_adapter(lora_config(options, DiffusersPolicy.lora_layers))
    return model


def activation_bytes(model: Any, rows: int) -> int:
    """What autograd keeps of `rows` rows in one forward.

    Raises:
        ValueError: the network is no UNet, text- or class-conditional, and not the transformer of SD3.
    """
    config, device = model.config, next(model.parameters()).device
    size = config.sample_size
    latents = torch.zeros(
        rows, config.in_channels, *(size if isinstance(size, (tuple, list)) else (size, size)), device=device
    )
    timestep = torch.zeros(rows, device=device)
    if config.get("joint_attention_dim"):
        tokens = CLIP_TOKENS + T5_TOKENS
        given: dict[str, Any] = {
            "encoder_hidden_states": torch.zeros(rows, tokens, config.joint_attention_dim, device=device),
            "pooled_projections": torch.zeros(rows, config.pooled_projection_dim, device=device),
        }
    elif config.get("cross_attention_dim"):
        given = {"encoder_hidden_states": torch.zeros(rows, CLIP_TOKENS, config.cross_attention_dim, device=device)}
    elif config.get("num_class_embeds"):
        places = (config.num_letters,) if config.get("num_letters") else ()
        given = {"class_labels": torch.zeros(rows, *places, dtype=torch.int64, device=device)}
    else:
        raise ValueError(
            "--plan knows class-conditional networks, UNet2DConditionModel, SD3Transformer2DModel: backbone is none"
        )
    return saved_bytes(lambda: model(latents, timestep=timestep, **given).sample, model)


def image_memory(config: Config, ranks: int, half: bool) -> ModelMemory:
    """See `rl.modalities.base.Modality.memory`."""
    train, sampler = config.train, config.sampler
    model = build_denoiser(config).to(torch.bfloat16 if half else torch.float32)
    total, trained = num_parameters(model)
    per_update = train.prompts_per_step * train.group_size // train.updates_per_step // ranks
    steps = min(train.micro_batch_steps or sampler.num_inference_steps, sampler.num_inference_steps)
    rows = min(train.micro_batch_size, per_update) * steps * (1 if sampler.guidance_scale == 1 else 2)
    return ModelMemory(
        total,
        trained,
        activation_bytes(model, rows),
        f"{rows} denoiser row(s) in a forward, guidance included, not recomputed",
        what="parameters of the denoiser",
        without=", without text encoders and VAE",
        cure="lower train.micro_batch_size or train.micro_batch_steps, or take adapters (model.lora.rank)",
    )
