"""LLaDA 2.0 and 2.1, mini and flash (arXiv 2602.08676; inclusionAI/dFactory): block-causal in blocks of 32, experts.

The network is GLM-4.5's, under other names. Router: a sigmoid in float32 scores the experts; the experts of a token
are chosen by score plus a bias, first the groups with the largest sum of their two best, then the experts in these;
the scores without the bias, divided by their sum and times `routed_scaling_factor`, weigh them. One more expert serves
every token, the first layers have no router, half of each head is rotated. The bias of the experts balanced their load
in pretraining: it is in the file, and stays as it is. config.json names neither mask token nor block size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rl.models.families.experts import check_router, expert_places
from rl.models.families.family import SIZES, Family, Part

# Parts of a layer, in memory and in the file; what has another number than 0 is one of several joined there.
_NAMES = {
    "self_attn.q_proj": ("attention.query_key_value", 0),
    "self_attn.k_proj": ("attention.query_key_value", 1),
    "self_attn.v_proj": ("attention.query_key_value", 2),
    "self_attn.o_proj": ("attention.dense", 0),
    "self_attn.q_norm": ("attention.query_layernorm", 0),
    "self_attn.k_norm": ("attention.key_layernorm", 0),
}


class Llada2(Family):
    model_type = "llada2_moe"
    architecture = "LLaDA2MoeModelLM"
    backbone = "glm4_moe"
    attention = "block_causal"
    keys: ClassVar[Mapping[str, str]] = {
        **SIZES,
        "num_experts": "n_routed_experts",
        "num_shared_experts": "n_shared_experts",
        "use_qkv_bias": "attention_bias",
        **{
            key: key
            for key in (
                *("head_dim", "moe_intermediate_size", "num_experts_per_tok", "n_group", "topk_group"),
                *("routed_scaling_factor", "first_k_dense_replace"),
            )
        },
    }
    constants: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "use_bias": False,
        "use_qk_norm": True,
        "use_rmsnorm": True,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "norm_topk_prob": True,
        "norm_head": False,
        "norm_softmax": False,
        "using_split_qkv_in_self_attention": False,
    }
    defaults: ClassVar[Mapping[str, Any]] = {"mask_token_id": 156895, "block_size": 32}

    def read(self, described: Mapping[str, Any]) -> dict[str, Any]:
        described = {"use_qkv_bias": False, **described}
        chosen = described["num_experts_per_tok"]
        check_router(described["num_experts"], chosen, described["n_group"], described["topk_group"])
        if not described["num_shared_experts"]:
            raise ValueError(f"config.json says num_shared_experts {described['num_shared_experts']!r}, read with 1 up")
        backbone = super().read(described)
        backbone["rope_parameters"]["partial_rotary_factor"] = described["partial_rotary_factor"]
        # The published code divides by the sum only where there is one.
        return backbone | {"use_qk_norm": True, "norm_topk_prob": chosen > 1}

    def write(self, backbone: Mapping[str, Any]) -> dict[str, Any]:
        rope = dict(backbone["rope_parameters"])
        factor = rope.pop("partial_rotary_factor")
        described = super().write({**backbone, "rope_parameters": rope})
        return described | {"partial_rotary_factor": factor, "rotary_dim": int(backbone["head_dim"] * factor)}

    def places(self, name: str, shape: tuple[int, ...]) -> Mapping[str, Part]:
        where, _, kind = name.replace("backbone.", "model.", 1).rpartition(".")
        if where == "model.embed_tokens":
            return {"model.word_embeddings.weight": Part()}
        if where.endswith(".mlp.experts"):
            return expert_places(where, kind, shape)
        if kind == "e_score_correction_bias":
            return {f"{where}.expert_bias": Part()}
        for ours, (theirs, piece) in _NAMES.items():
            if where.endswith(ours):
                return {f"{where.removesuffix(ours)}{theirs}.{kind}": Part(piece=piece)}
        return {f"{where}.{kind}": Part()}
