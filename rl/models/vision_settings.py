"""A vision tower by its transformers config, before there are weights. No torch at import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl.tasks.prompt_images import MAX_PLACES

# Mean and scale of the pixels, 0 to 1, that CLIP's towers were trained on (transformers.image_utils).
_CLIP = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])


def vision_settings(tower: Mapping[str, Any], field: str) -> dict[str, Any]:
    """The settings of a tower by its transformers config, with the pixels' mean and scale that CLIP or SigLIP has.

    Raises:
        ValueError: it is no model of transformers that cuts an image into patches.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = str(tower.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{field}: model_type {kind!r} is no model of transformers: take siglip_vision_model or another"
        )
    config = CONFIG_MAPPING[kind](**tower)
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if not isinstance(size, int) or not isinstance(patch, int):
        raise ValueError(f"{field}: {kind} does not say image_size and patch_size as whole numbers: take another tower")
    count = (size // patch) ** 2
    if size < patch or count > MAX_PLACES:
        raise ValueError(
            f"{field}: {count} patches of {patch} in an image of {size}, and 1 to {MAX_PLACES} can be used"
        )
    if config.num_channels not in (1, 3):
        raise ValueError(f"{field}.num_channels is {config.num_channels}: images have 1 or 3")
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    if isinstance(width, int) and isinstance(heads, int) and (heads < 1 or width % heads):
        raise ValueError(f"{field}: hidden_size {width} is no multiple of num_attention_heads {heads}")
    half = [0.5] * config.num_channels
    mean, std = _CLIP if kind.startswith("clip") and config.num_channels == 3 else (half, half)
    return {"tower": config.to_dict(), "num_tokens": count, "layer": -1, "mean": mean, "std": std}
