"""Tiny random diffusers pipelines, saved in the published folder layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tests.tiny_vision import clip_text_config, clip_tokenizer, roughen

FAMILIES = ("sd", "sdxl", "sd3", "flux", "flux-schnell", "flux2", "qwen", "sana", "z-image")
SIZE = 16  # pixels; the VAE halves them


def save_pipeline(folder: Path, family: str, seed: int = 0, **scheduler: Any) -> Any:
    """Write a pipeline of a family to `folder` and return it."""
    torch.manual_seed(seed)
    makers = {"sd": _sd, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux, "flux-schnell": _schnell, "sana": _sana}
    makers |= {"flux2": _flux2, "qwen": _qwen, "z-image": _z_image}
    pipeline = makers[family](**scheduler)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            roughen(part, seed + len(name))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline


def _text_encoder(kind: str = "CLIPTextModel", **changes: Any) -> Any:
    return getattr(transformers, kind)(transformers.CLIPTextConfig(**clip_text_config(**changes)))


def _t5() -> Any:
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=160, **sizes))


def _t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789,."]
    return transformers.T5TokenizerFast(vocab=pieces, model_max_length=16)


def _vae(channels: int, **changes: Any) -> Any:
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    settings = {"block_out_channels": [4, 8], "norm_num_groups": 2, "latent_channels": channels, "sample_size": SIZE}
    return diffusers.AutoencoderKL(**blocks, **settings, **changes)


def _unet(width: int, **changes: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=[8, 16],
        layers_per_block=1,
        norm_num_groups=2,
        attention_head_dim=4,
        cross_attention_dim=width,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        **changes,
    )


def _sd(**scheduler: Any) -> Any:
    """With the scheduler file of SD 1.5, which describes PNDM."""
    published = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    return diffusers.StableDiffusionPipeline(
        vae=_vae(4),
        text_encoder=_text_encoder(),
        tokenizer=clip_tokenizer(),
        unet=_unet(16),
        scheduler=diffusers.PNDMScheduler(**published, skip_prk_steps=True, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(**scheduler: Any) -> Any:
    published = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    text = {"projection_class_embeddings_input_dim": 12 + 6 * 8, "addition_time_embed_dim": 8}
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(4, force_upcast=True),
        text_encoder=_text_encoder(),
        text_encoder_2=_text_encoder("CLIPTextModelWithProjection"),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=_unet(32, addition_embed_type="text_time", transformer_layers_per_block=1, **text),
        scheduler=diffusers.EulerDiscreteScheduler(**published, timestep_spacing="leading", **scheduler),
        add_watermarker=False,
    )


def _sd3(**scheduler: Any) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=SIZE // 2,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        pos_embed_max_size=16,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=_vae(4, shift_factor=0.06, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_text_encoder("CLIPTextModelWithProjection"),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_text_encoder("CLIPTextModelWithProjection"),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5(),
        tokenizer_3=_t5_tokenizer(),
    )


def _flux(guidance_embeds: bool = True, **scheduler: Any) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    shift = {"shift": 3.0, "use_dynamic_shifting": True} if guidance_embeds else {"shift": 1.0}
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{**shift, **scheduler}),
        vae=_vae(4, shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_text_encoder(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=_t5_tokenizer(),
    )


def _schnell(**scheduler: Any) -> Any:
    return _flux(guidance_embeds=False, **scheduler)


def _sana(**scheduler: Any) -> Any:
    transformer = diffusers.SanaTransformer2DModel(
        sample_size=SIZE // 2,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
    )
    blocks = ("ResBlock", "EfficientViTBlock")
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.4,
    )
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    text = transformers.Gemma2Config(vocab_size=160, hidden_size=16, intermediate_size=32, **sizes)
    return diffusers.SanaPipeline(
        tokenizer=_t5_tokenizer(),
        text_encoder=transformers.Gemma2Model(text),
        vae=vae,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
    )


def _z_image(**scheduler: Any) -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
    )  # fmt: skip
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    text = transformers.Qwen3Config(vocab_size=160, hidden_size=16, intermediate_size=32, **sizes)
    tokenizer = _t5_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
        vae=_vae(4, shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=transformers.Qwen3Model(text),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _flux2(**scheduler: Any) -> Any:
    """klein; its text states are those of layers 9, 18 and 27."""
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"num_hidden_layers": 27, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4}
    text = transformers.Qwen3Config(vocab_size=160, hidden_size=8, intermediate_size=8, **sizes)
    tokenizer = _t5_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=[4, 8], norm_num_groups=2, latent_channels=4, sample_size=SIZE, patch_size=(2, 2), **blocks
    )
    torch.nn.init.normal_(vae.bn.running_mean)
    torch.nn.init.uniform_(vae.bn.running_var, 0.5, 2.0)
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"use_dynamic_shifting": True, **scheduler}),
        vae=vae,
        text_encoder=transformers.Qwen3ForCausalLM(text),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _qwen(**scheduler: Any) -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    rope = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}
    words = {"vocab_size": 160, "hidden_size": 16, "intermediate_size": 16, "rope_parameters": rope, **heads}
    sight = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**{"use_dynamic_shifting": True, **scheduler}),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.5, 2.0, 1.0],
        ),
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig(text_config=words, vision_config=sight)
        ),
        tokenizer=_t5_tokenizer(),
        transformer=transformer,
    )
