"""Longer contexts than a model was trained with, by a larger base of its rotary embedding. No torch at import.

LongLLaDA (Liu et al. 2025, arXiv 2506.14429) multiplies the base b by a factor that the scaling laws of rotary
extrapolation give, and trains nothing. With d rotated dimensions per head and T trained positions, the dimensions up to
d_crit = 2 ceil(d/2 log_b(T / 2 pi)) have seen a whole turn; the factor by which T' positions turn them no further is
(T' / 2 pi)^(d / d_crit) / b. Rounded up, it is 4, 14, 31 and 55 for LLaDA 8B (b 500,000, d 128, T 4,096) at 8, 16, 24
and 32 thousand positions: the numbers of its published evaluation, as are 4 and 13 for Llama 3 and 5 for Dream.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rl.model_section import ContextOptions


def base_factor(base: float, dimensions: int, trained: int, wanted: int) -> int:
    """What the base of a rotary embedding is multiplied with.

    Args:
        dimensions: of a head that are rotated.
        trained, wanted: positions.
    """
    turns = math.log(trained / (2 * math.pi), base)
    critical = 2 * math.ceil(dimensions / 2 * turns)
    return max(1, math.ceil((wanted / (2 * math.pi)) ** (dimensions / critical) / base))


def stretched(backbone: Mapping[str, Any], options: ContextOptions) -> dict[str, Any]:
    """The transformers config of a backbone with `model.context.length` positions.

    Raises:
        ValueError: it has no plain rotary embedding, or was trained with as many positions.
    """
    from transformers import AutoConfig

    assert options.length is not None
    config = AutoConfig.for_model(**backbone)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "default":
        kind = rope.get("rope_type", "no rotary embedding")
        raise ValueError(f"model.context.length is for plain rotary embeddings, and this model has {kind}")
    trained = options.trained_length or config.max_position_embeddings
    if options.length <= trained:
        raise ValueError(
            f"model.context.length is {options.length}, and the model was trained with {trained} positions: leave it "
            "out, or set model.context.trained_length to what it really saw"
        )
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dimensions = int(head * rope.get("partial_rotary_factor", 1.0))
    base = rope["rope_theta"] * base_factor(rope["rope_theta"], dimensions, trained, options.length)
    kept = {key: value for key, value in backbone.items() if key not in ("rope_theta", "rope_scaling")}
    return kept | {
        "rope_parameters": {**rope, "rope_theta": base},
        "max_position_embeddings": max(config.max_position_embeddings, options.length),
    }
