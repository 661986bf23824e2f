"""Dream 7B and DiffuCoder (Ye et al. 2025, arXiv 2508.15487): Qwen2, full attention, logits shifted by one position."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl.models.families.family import SAME_BUT_BACKBONE, Family, rotary, unrotary

_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)


def _read(described: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: described[key] for key in _KEYS}, "hidden_act": "silu", **rotary(described)}


def _write(backbone: Mapping[str, Any]) -> dict[str, Any]:
    return {**{key: backbone[key] for key in _KEYS}, **unrotary(backbone)}


DREAM = Family(
    name="dream",
    model_type="Dream",
    architecture="DreamModel",
    backbone="qwen2",
    attention="full",
    logit_shift=1,
    constants={"hidden_act": "silu", "use_sliding_window": False},
    template={"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": False},
    names=SAME_BUT_BACKBONE,
    read=_read,
    write=_write,
)
