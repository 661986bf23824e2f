"""SDAR and TraDo (Cheng et al. 2025, arXiv 2510.06303; Wang et al. 2025, arXiv 2509.06949): Qwen3, block-causal.

SDAR 30B-A3B is Qwen3-MoE: a softmax router, the probabilities of a token's 8 of 128 experts divided by their sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rl.models.families.experts import MixtureFamily, check_router
from rl.models.families.family import SIZES, Family


class Sdar(Family):
    model_type = "sdar"
    architecture = "SDARForCausalLM"
    backbone = "qwen3"
    attention = "block_causal"
    keys: ClassVar[Mapping[str, str]] = {**SIZES, "head_dim": "head_dim", "attention_bias": "attention_bias"}

    def read(self, described: Mapping[str, Any]) -> dict[str, Any]:
        return super().read({"attention_bias": False, **described})


class SdarMoe(MixtureFamily, Sdar):
    model_type = "sdar_moe"
    architecture = "SDARMoeForCausalLM"
    backbone = "qwen3_moe"
    keys: ClassVar[Mapping[str, str]] = {
        **Sdar.keys,
        "num_experts": "num_local_experts",
        **{key: key for key in ("moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob")},
        **{key: key for key in ("decoder_sparse_step", "mlp_only_layers")},
    }
    defaults: ClassVar[Mapping[str, Any]] = {
        "mask_token_id": 151669,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }

    def read(self, described: Mapping[str, Any]) -> dict[str, Any]:
        check_router(described["num_experts"], described["num_experts_per_tok"])
        return super().read({**self.defaults, **described})
