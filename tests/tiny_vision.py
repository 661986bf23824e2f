"""Tiny random vision models in the published folder layouts, and pictures to show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def pictures(count: int, size: int = 24, channels: int = 3, seed: int = 0) -> list[np.ndarray]:
    """uint8 [size, size, channels]: smooth random colour fields, every one different."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, channels))
    return [np.kron(field, np.ones((size // 4, size // 4, 1), dtype=int)).astype(np.uint8) for field in coarse]


def clip_tokenizer(max_length: int = 16) -> Any:
    """A CLIPTokenizer that knows letters and digits and merges none."""
    symbols = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=max_length)


def clip_text_config(**changes: Any) -> dict[str, Any]:
    ends = len(LETTERS) * 2
    small: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    small |= {"num_hidden_layers": 2, "max_position_embeddings": 16, "projection_dim": 12, "vocab_size": ends + 2}
    return small | {"bos_token_id": ends, "eos_token_id": ends + 1, "pad_token_id": ends + 1} | changes


def roughen(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights large enough that different inputs give clearly different outputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 * parameter[0].numel() ** -0.5, generator=generator)
    return model.eval()


def save_clip(folder: Path, seed: int = 0) -> transformers.CLIPModel:
    """A CLIPModel with tokenizer and image processor, as on the hub."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    vision |= {"image_size": 16, "patch_size": 8, "projection_dim": 12}
    config = transformers.CLIPConfig(
        text_config=clip_text_config(), vision_config=vision, projection_dim=12, logit_scale_init_value=3.0
    )
    model = roughen(transformers.CLIPModel(config), seed)
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    processor = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    processor.save_pretrained(folder)
    return model


def save_vit_classifier(folder: Path, labels: list[str], seed: int = 0) -> transformers.ViTForImageClassification:
    """A ViT image classifier with its processor, as on the hub."""
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_hidden_layers=2,
        image_size=16,
        patch_size=8,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    model = roughen(transformers.ViTForImageClassification(config), seed)
    model.save_pretrained(folder)
    processor = transformers.models.vit.image_processing_pil_vit.ViTImageProcessorPil(size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    return model
