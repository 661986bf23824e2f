"""LLaDA-MoE 7B-A1B (inclusionAI 2025): full attention, every token routed to 8 of 64 experts.

The network is Qwen3-MoE's: queries and keys are normalised head by head, the router is a softmax whose k largest
probabilities weigh the experts as they are (OLMoE, from which it comes, normalises all heads together). config.json
has LLaDA's model_type, `num_experts` tells the two apart; it has no mask token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rl.models.families.experts import MixtureFamily, check_router
from rl.models.families.family import SIZES


class LladaMoe(MixtureFamily):
    model_type = "llada"
    architecture = "LLaDAMoEModelLM"
    backbone = "qwen3_moe"
    keys: ClassVar[Mapping[str, str]] = {
        **{theirs: ours for theirs, ours in SIZES.items() if theirs != "intermediate_size"},
        "dense_intermediate_size": "intermediate_size",
        "expert_intermediate_size": "moe_intermediate_size",
        "num_experts": "num_local_experts",
        "num_experts_per_tok": "num_experts_per_tok",
        "attention_bias": "attention_bias",
    }
    constants: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "silu",
        "clip_qkv": None,
        "qk_layernorm": True,
        "norm_topk_prob": False,
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "shared_expert_intermediate_size": None,
        "router_num_group": None,
        "router_topk_group": None,
        "routed_scaling_factor": 1,
        "partial_rotary_factor": 1,
    }
    defaults: ClassVar[Mapping[str, Any]] = {"mask_token_id": 156895}

    def reads(self, described: Mapping[str, Any]) -> bool:
        return super().reads(described) and bool(described.get("num_experts"))

    def read(self, described: Mapping[str, Any]) -> dict[str, Any]:
        described = {"dense_intermediate_size": described["expert_intermediate_size"], **described}
        check_router(described["num_experts"], described["num_experts_per_tok"])
        layers = described["num_hidden_layers"]
        sparse = described.get("moe_layer_freq") or [1] * layers
        if len(sparse) != layers:
            raise ValueError(f"config.json says moe_layer_freq of {len(sparse)} layers, num_hidden_layers is {layers}")
        own = {"norm_topk_prob": False, "mlp_only_layers": [i for i, here in enumerate(sparse) if not here]}
        return super().read({"attention_bias": False, **described}) | own

    def write(self, backbone: Mapping[str, Any]) -> dict[str, Any]:
        dense = backbone["mlp_only_layers"]
        return super().write(backbone) | {
            "moe_layer_freq": [int(i not in dense) for i in range(backbone["num_hidden_layers"])]
        }
