"""SDAR and TraDo (Cheng et al. 2025, arXiv 2510.06303; Wang et al. 2025, arXiv 2509.06949): Qwen3, block-causal."""

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
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
)


def _read(described: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{key: described[key] for key in _KEYS},
        "hidden_act": "silu",
        "attention_bias": described.get("attention_bias", False),
        **rotary(described),
    }


def _write(backbone: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{key: backbone[key] for key in _KEYS},
        "attention_bias": backbone["attention_bias"],
        **unrotary(backbone),
    }


SDAR = Family(
    name="sdar",
    model_type="sdar",
    architecture="SDARForCausalLM",
    backbone="qwen3",
    attention="block_causal",
    logit_shift=0,
    constants={"hidden_act": "silu", "use_sliding_window": False},
    template={"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": False},
    names=SAME_BUT_BACKBONE,
    read=_read,
    write=_write,
)
