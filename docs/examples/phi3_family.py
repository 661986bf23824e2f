"""Phi-3 (Abdin et al. 2024, arXiv 2404.14219) as a diffusion model: Llama under full attention, with fused matrices.

Its file joins the query, key and value weights of a layer in one matrix, and the two matrices into the MLP in
another; in memory they are apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rl.models.families.family import Family, Part

# Module in memory -> module in the file, and which of the joined pieces it is there.
FUSED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


class Phi3(Family):
    model_type = "phi3"
    architecture = "Phi3ForCausalLM"
    backbone = "llama"
    constants: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu", "partial_rotary_factor": 1.0}

    def read(self, described: Mapping[str, Any]) -> dict[str, Any]:
        backbone = super().read(described)
        rotary = backbone["rope_parameters"]
        if rotary["rope_type"] != "default" or rotary.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"config.json: rotary embeddings of other kinds are not read by this example: {rotary}")
        return backbone

    def places(self, name: str, shape: tuple[int, ...]) -> Mapping[str, Part]:
        for module, (fused, piece) in FUSED.items():
            if f".{module}." in name:
                (file,) = super().places(name.replace(module, fused), shape)
                return {file: Part(piece=piece)}
        return super().places(name, shape)
