"""DiffusionGemma (google/diffusiongemma-26B-A4B-it): a causal encoder, and a decoder of canvases of uniform noise.

transformers' own classes are the network, under the names of the published files (`rl/models/canvas_lm.py`). This file
says what its config.json means before there are weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl.models.families.experts import check_router
from rl.models.families.family import Family


class DiffusionGemma(Family):
    model_type = "diffusion_gemma"
    architecture = "DiffusionGemmaForBlockDiffusion"
    backbone = "diffusion_gemma_text"
    noise = "uniform"

    def fields(self, described: Mapping[str, Any], block_length: int | None = None) -> dict[str, Any]:
        """The decoder's transformers config, and the canvas; there is no `DiffusionLMConfig` of it.

        Raises:
            ValueError: a number is missing, or no such model can be built.
        """
        if not self.reads(described):
            raise ValueError(
                f"config.json says model_type {described.get('model_type')!r}, which is not diffusion_gemma"
            )
        text, canvas = described.get("text_config") or {}, described.get("canvas_length", 256)
        if not isinstance(canvas, int) or canvas < 1:
            raise ValueError(f"config.json says canvas_length {canvas!r}: a canvas has 1 token or more")
        missing = [key for key in ("num_experts", "top_k_experts", "moe_intermediate_size") if not text.get(key)]
        if missing:
            raise ValueError(f"config.json has no text_config.{missing[0]}: DiffusionGemma is a mixture of experts")
        check_router(text["num_experts"], text["top_k_experts"])
        if not (described.get("tie_word_embeddings", True) and text.get("tie_word_embeddings", True)):
            raise ValueError(
                "config.json says tie_word_embeddings false: encoder and decoder are read with tied weights only"
            )
        if text.get("attention_bias"):
            raise ValueError(
                "config.json says attention_bias true: encoder and decoder would have biases of their own, which are "
                "not read"
            )
        positions = text.get("max_position_embeddings", 131_072)
        return {
            "backbone": {**text, "model_type": self.backbone, "max_position_embeddings": positions},
            "attention": self.attention,
            "noise": self.noise,
            "canvas_length": canvas,
            "tie_word_embeddings": True,
        }

    def describe(self, config: Any, backbone: Any, dtype: str) -> dict[str, Any]:
        """Never asked with success: such a model is saved in its own layout already.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"--layout {self.name}: such a model is in its own layout already, leave --layout out")
