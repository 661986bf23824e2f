"""What an image run will need of memory, per rank: `denoise-rl check --plan` on a config with an image task.

States are counted as in `memory.py`. Activations are counted on the meta device too: the denoiser that
`model.backbone` describes, with its adapters, predicts a micro-batch, and autograd is asked what it keeps. Text
encoders, the VAE and the forwards of sampling, which keep nothing, come on top.
"""

from __future__ import annotations

from typing import Any

import torch

from rl.config import Config
from rl.models.class_policy import network_class
from rl.train.learner import read_deepspeed_config
from rl.train.memory import GIB, learner_line, model_states, saved_bytes

CLIP_TOKENS = 77


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
        ValueError: the network is neither a text- nor a class-conditional UNet.
    """
    config, device = model.config, next(model.parameters()).device
    size = config.sample_size
    latents = torch.zeros(
        rows, config.in_channels, *(size if isinstance(size, (tuple, list)) else (size, size)), device=device
    )
    timestep = torch.zeros(rows, device=device)
    if config.get("cross_attention_dim"):
        given: dict[str, Any] = {
            "encoder_hidden_states": torch.zeros(rows, CLIP_TOKENS, config.cross_attention_dim, device=device)
        }
    elif config.get("num_class_embeds"):
        given = {"class_labels": torch.zeros(rows, dtype=torch.int64, device=device)}
    else:
        raise ValueError("--plan knows class-conditional networks and UNet2DConditionModel: model.backbone is neither")
    return saved_bytes(
        lambda: model(latents, timestep, **given).sample, {p.untyped_storage()._cdata for p in model.parameters()}
    )


def image_memory_lines(config: Config, ranks: int, limit_gib: float | None = None) -> list[str]:
    """The plan, one line each; see `rl.train.memory.memory_lines`."""
    train, sampler = config.train, config.image_sampler
    deepspeed = read_deepspeed_config(train.deepspeed)
    half = any(deepspeed.get(kind, {}).get("enabled", False) for kind in ("bf16", "fp16"))
    model = build_denoiser(config).to(torch.bfloat16 if half else torch.float32)
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    per_update = train.prompts_per_step * train.group_size // train.updates_per_step // ranks
    steps = min(train.micro_batch_steps or sampler.num_inference_steps, sampler.num_inference_steps)
    rows = min(train.micro_batch_size, per_update) * steps * (1 if sampler.guidance_scale == 1 else 2)
    micro = activation_bytes(model, rows)
    # As in `memory.py`: what is frozen exists once.
    own = total if deepspeed.get("zero_optimization", {}).get("stage", 0) == 3 else trained
    states = model_states(own, trained, deepspeed, ranks)
    reference = getattr(config.algorithm.build(), "needs_reference", False)
    copies = (2 if half else 4) * (total + trained * reference)
    peak = states.device + copies + micro
    lines = [
        f"memory: {total / 1e9:.3g} B parameters of the denoiser, {trained / 1e6:.3g} M trained, {ranks} rank(s), "
        f"{train.deepspeed}, per rank in GiB",
        f"memory: {learner_line('policy', states)}",
        f"memory: copy that samples{' and frozen reference' if reference else ''} {copies / GIB:.2f}",
        f"memory: learning: activations {micro / GIB:.2f} ({rows} denoiser row(s) in a forward, guidance included, not "
        "recomputed)",
        f"memory: peak {peak / GIB:.1f} while learning, without text encoders and VAE",
    ]
    if limit_gib is not None and peak > limit_gib * GIB:
        raise ValueError(
            f"the plan needs {peak / GIB:.1f} GiB per rank and --memory is {limit_gib:g}: lower train.micro_batch_size "
            "or train.micro_batch_steps, or take adapters (model.lora.rank)"
        )
    return lines
