"""SDAR and TraDo (Cheng et al. 2025, arXiv 2510.06303; Wang et al. 2025, arXiv 2509.06949): Qwen3, block-causal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rl.models.families.family import SIZES, Family


class Sdar(Family):
    model_type = "sdar"
    architecture = "SDARForCausalLM"
    backbone = "qwen3"
    attention = "block_causal"
    keys: ClassVar[Mapping[str, str]] = {**SIZES, "head_dim": "head_dim", "attention_bias": "attention_bias"}

    def read(self, described: Mapping[str, Any]) -> dict[str, Any]:
        return super().read({"attention_bias": False, **described})
