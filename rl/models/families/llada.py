"""LLaDA 8B Base and Instruct, LLaDA 1.5 (Nie et al. 2025, arXiv 2502.09992): Llama under OLMo's names, full attention.

The published code is OLMo's: many switches, of which the checkpoints use one setting each. Its tokenizer has no
mask token (`tokenizer.mask_token` is None), the id stands in config.json; 126,464 embeddings, fewer tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl.models.families.family import Family

_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}

# Where both agree on what a key means.
_KEYS = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "max_sequence_length": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
}


def _read(described: Mapping[str, Any]) -> dict[str, Any]:
    vocab_size = described.get("embedding_size") or described["vocab_size"]
    inner = described.get("mlp_hidden_size") or described["mlp_ratio"] * described["d_model"]
    return {
        **{ours: described[theirs] for theirs, ours in _KEYS.items()},
        "vocab_size": vocab_size,
        "intermediate_size": inner,
        "num_key_value_heads": described.get("n_kv_heads") or described["n_heads"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": described["rope_theta"]},
    }


def _write(backbone: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{theirs: backbone[ours] for theirs, ours in _KEYS.items()},
        "embedding_size": backbone["vocab_size"],
        "vocab_size": backbone["vocab_size"],
        "mlp_hidden_size": backbone["intermediate_size"],
        "n_kv_heads": backbone["num_key_value_heads"],
        "rope_theta": backbone["rope_parameters"]["rope_theta"],
    }


LLADA = Family(
    name="llada",
    model_type="llada",
    architecture="LLaDAModelLM",
    backbone="llama",
    attention="full",
    logit_shift=0,
    constants={
        "block_type": "llama",
        "block_group_size": 1,
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "attention_layer_norm": False,
        "input_emb_norm": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "multi_query_attention": None,
        "rope": True,
        "alibi": False,
        "scale_logits": False,
        "weight_tying": False,
    },
    template={"rope_full_precision": True, "attention_dropout": 0.0, "residual_dropout": 0.0, "embedding_dropout": 0.0},
    names=(
        ("backbone.embed_tokens.weight", "model.transformer.wte.weight"),
        ("backbone.norm.weight", "model.transformer.ln_f.weight"),
        ("lm_head.weight", "model.transformer.ff_out.weight"),
        *(
            (f"backbone.layers.{{}}.{ours}.weight", f"model.transformer.blocks.{{}}.{theirs}.weight")
            for ours, theirs in _LAYER.items()
        ),
    ),
    read=_read,
    write=_write,
)
