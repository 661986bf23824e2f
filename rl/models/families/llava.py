"""LLaVA in transformers' layout (Liu et al. 2023, arXiv 2310.03744): an autoregressive model with a vision tower.

`model.convert` makes a diffusion model of it, as DiffusionVL (arXiv 2512.15713) and Fast-dVLM do with theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rl.model_section import ConvertOptions
from rl.models.families.causal import SETTINGS, CausalFamily, settings_of
from rl.models.families.family import Part
from rl.models.vision_settings import vision_settings

_PROJECTOR = {
    "vision.projector.0.": "multi_modal_projector.linear_1.",
    "vision.projector.2.": "multi_modal_projector.linear_2.",
}

# What this reading depends on: key of config.json -> the only value.
_ONLY = {
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_select_strategy": "default",
}


class Llava(CausalFamily):
    """As transformers 5 writes it; `text_config` is one of the autoregressive families here.

    Attributes:
        tower: what the weights of the vision tower are called in the file.
    """

    model_type = backbone = "llava"
    architecture = "LlavaForConditionalGeneration"
    inner = "language_model.model."
    head = "language_model.lm_head."
    tower: ClassVar[str] = "vision_tower."

    def read(self, described: Mapping[str, Any]) -> dict[str, Any]:
        text = {"model_type": "llama", **described["text_config"]}
        families = {family.model_type: family for family in CausalFamily.__subclasses__() if family is not Llava}
        if text["model_type"] not in families:
            known = ", ".join(sorted(families))
            raise ValueError(f"text_config has model_type {text['model_type']!r}, and what is read is {known}")
        return families[text["model_type"]]().read(text)

    def vision(self, described: Mapping[str, Any]) -> dict[str, Any]:
        for key, value in _ONLY.items():
            if described.get(key, value) != value:
                raise ValueError(
                    f"config.json says {key} {described[key]!r}, the llava layout is read with {value!r} only"
                )
        layer = described.get("vision_feature_layer", -2)
        if not isinstance(layer, int):
            raise ValueError(f"config.json says vision_feature_layer {layer!r}, and one layer is read")
        tower = {"model_type": "clip_vision_model", **described["vision_config"]}
        return vision_settings(tower, "vision_config") | {"layer": layer, "placeholder": "<image>"}

    def fields(
        self,
        described: Mapping[str, Any],
        block_length: int | None = None,
        convert: ConvertOptions | None = None,
        mask_token_id: int | None = None,
    ) -> dict[str, Any]:
        fields = super().fields(described, block_length, convert, mask_token_id)
        ties = described.get("tie_word_embeddings", described["text_config"].get("tie_word_embeddings", False))
        return fields | {"vision": self.vision(described), "tie_word_embeddings": ties}

    def places(self, name: str, shape: tuple[int, ...]) -> Mapping[str, Part]:
        for ours, theirs in {**_PROJECTOR, "vision.tower.": self.tower}.items():
            if name.startswith(ours):
                return {name.replace(ours, theirs, 1): Part()}
        return super().places(name, shape)

    def describe(self, config: Any, backbone: Any, dtype: str) -> dict[str, Any]:
        before = config.published or {}
        if before.get("model_type") != self.model_type:
            raise ValueError("--layout llava is for models that were loaded from that layout: leave it out")
        text = {**before["text_config"], "vocab_size": backbone.vocab_size}
        now = {"text_config": text, "dtype": dtype, SETTINGS: settings_of(config.to_dict()).model_dump()}
        return {key: value for key, value in before.items() if key != "torch_dtype"} | now


class LlavaHub(Llava):
    """As transformers 4 wrote it: the tower has one more name in front."""

    tower = "vision_tower.vision_model."
