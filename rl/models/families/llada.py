"""LLaDA 8B Base and Instruct, LLaDA 1.5 (Nie et al. 2025, arXiv 2502.09992): Llama under OLMo's names, full attention.

The published code is OLMo's: many switches, of which the checkpoints use one setting each. Its tokenizer has no
mask token (`tokenizer.mask_token` is None), the id stands in config.json; 126,464 embeddings, fewer tokens.

Queries and keys are rotated in float32 whatever the weights' dtype where config.json has `rope_full_precision` (the
checkpoints do), as in the published code; transformers' Llama rotates in bfloat16. docs/models.md: the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rl.models.families.family import Family, Part

# The last part of a module's name, in memory and in the file.
_NAMES = {
    "embed_tokens": "wte",
    "norm": "ln_f",
    "lm_head": "ff_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "o_proj": "attn_out",
    "gate_proj": "ff_proj",
    "up_proj": "up_proj",
    "down_proj": "ff_out",
}


class Llada(Family):
    model_type = "llada"
    architecture = "LLaDAModelLM"
    backbone = "llama"
    keys: ClassVar[Mapping[str, str]] = {
        "d_model": "hidden_size",
        "n_layers": "num_hidden_layers",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "mlp_hidden_size": "intermediate_size",
        "embedding_size": "vocab_size",
        "max_sequence_length": "max_position_embeddings",
        "rms_norm_eps": "rms_norm_eps",
    }
    constants: ClassVar[Mapping[str, Any]] = {
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
    }
    template: ClassVar[Mapping[str, Any]] = {
        "rope_full_precision": False,
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
    }

    def reads(self, described: Mapping[str, Any]) -> bool:
        # LLaDA-MoE has the same model_type, and another network.
        return super().reads(described) and not described.get("num_experts")

    def fields(self, described: Mapping[str, Any], block_length: int | None = None) -> dict[str, Any]:
        precise = bool(described.get("rope_full_precision", True))
        return super().fields(described, block_length) | {"rope_full_precision": precise}

    def read(self, described: Mapping[str, Any]) -> dict[str, Any]:
        sizes = {
            "n_kv_heads": described.get("n_kv_heads") or described["n_heads"],
            "mlp_hidden_size": described.get("mlp_hidden_size") or described["mlp_ratio"] * described["d_model"],
            "embedding_size": described.get("embedding_size") or described["vocab_size"],
            "rope_scaling": None,
        }
        return super().read({**described, **sizes}) | {"attention_bias": False, "mlp_bias": False}

    def write(self, backbone: Mapping[str, Any]) -> dict[str, Any]:
        described = super().write(backbone) | {"vocab_size": backbone["vocab_size"]}
        del described["rope_scaling"]
        return described

    def places(self, name: str, shape: tuple[int, ...]) -> Mapping[str, Part]:
        *above, module, kind = name.split(".")
        if kind != "weight" or module not in _NAMES:
            return {}
        where = f"blocks.{above[2]}." if "layers" in above else ""
        return {f"model.transformer.{where}{_NAMES[module]}.weight": Part()}
