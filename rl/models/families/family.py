"""What a family is, and the pieces that families share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Tensor names of our DiffusionLM and of a published layout; {} stands for any text, the same on both sides.
Names = Sequence[tuple[str, str]]

# transformers' own decoders differ from these layouts in the first part of the name alone.
SAME_BUT_BACKBONE: Names = (("backbone.{}", "model.{}"), ("lm_head.weight", "lm_head.weight"))


@dataclass(frozen=True)
class Family:
    """A published checkpoint layout.

    Attributes:
        name: what `denoise-rl export --layout` calls it.
        model_type, architecture: as in its config.json.
        backbone: the transformers decoder it is built on.
        attention, logit_shift: as of `DiffusionLM`.
        constants: keys of config.json that this reading depends on, with the only value it holds for. A key that is
            absent counts as having it.
        template: keys written into the config.json of a model that did not come from a published one.
        names: tensor names, ours and theirs.
        read: their config.json -> the backbone's transformers config.
        write: the backbone's transformers config as a dict -> their keys of it.
    """

    name: str
    model_type: str
    architecture: str
    backbone: str
    attention: str
    logit_shift: int
    constants: Mapping[str, Any]
    template: Mapping[str, Any]
    names: Names
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[Mapping[str, Any]], dict[str, Any]]

    def fields(self, described: Mapping[str, Any], block_length: int | None = None) -> dict[str, Any]:
        """Arguments of our `DiffusionLMConfig` from a published config.json.

        Args:
            block_length: overrides the file's `block_size`; block-causal families only.

        Raises:
            ValueError: a key is missing, or has a value that this layout is not read with.
        """
        for key, value in self.constants.items():
            if described.get(key, value) != value:
                raise ValueError(
                    f"config.json says {key} {described[key]!r}, the {self.name} layout is read with {value!r} only"
                )
        try:
            backbone = self.read(described)
            mask_token_id = described["mask_token_id"]
        except KeyError as error:
            raise ValueError(f"config.json has no {error}, which the {self.name} layout needs") from None
        if self.attention == "block_causal" and block_length is None:
            block_length = described.get("block_size")
            if block_length is None:
                raise ValueError("config.json has no block_size: set model.block_length")
        # A padding id would freeze that row of the embedding; in these models it is the end token's.
        ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": described.get("eos_token_id")}
        return {
            "backbone": {"model_type": self.backbone, **backbone, **ids, "attention_dropout": 0.0},
            "mask_token_id": mask_token_id,
            "attention": self.attention,
            "block_length": block_length,
            "logit_shift": self.logit_shift,
            "tie_word_embeddings": bool(described.get("tie_word_embeddings", False)),
            "published": dict(described),
        }

    def describe(self, config: Any, backbone: Any, dtype: str) -> dict[str, Any]:
        """The published config.json of one of our models: what it was loaded from, brought up to date.

        Args:
            config: a `DiffusionLMConfig`.
            backbone: the resolved transformers config of its backbone.

        Raises:
            ValueError: the model is not of this family.
        """
        kind = (backbone.model_type, config.attention, config.logit_shift)
        if kind != (self.backbone, self.attention, self.logit_shift):
            raise ValueError(
                f"--layout {self.name} needs backbone {self.backbone}, attention {self.attention} and logit_shift "
                f"{self.logit_shift}; the model has {kind[0]}, {kind[1]} and {kind[2]}"
            )
        before = config.published or {}
        if before.get("model_type") != self.model_type:
            eos = backbone.eos_token_id
            before = {**self.constants, **self.template, "eos_token_id": eos, "pad_token_id": eos}
        now = {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "mask_token_id": config.mask_token_id,
            "tie_word_embeddings": config.tie_word_embeddings,
            **({"block_size": config.block_length} if self.attention == "block_causal" else {}),
            **self.write(backbone.to_dict()),
        }
        # A key that the published file leaves at its default stays left out.
        described = before | {k: v for k, v in now.items() if k in before or v not in (None, False)}
        ours = backbone.to_dict()
        for key, value in self.read(described).items():
            if ours.get(key) != value:
                raise ValueError(f"--layout {self.name} has no place for the backbone's {key} {ours.get(key)!r}")
        key = "dtype" if "dtype" in described else "torch_dtype"
        if key in described or before is not config.published:
            described[key] = dtype
        return described


def rename(name: str, names: Names, to_ours: bool) -> str | None:
    """A tensor's name in the other layout; None when it has none. Example: the first pair of `SAME_BUT_BACKBONE`
    takes "model.norm.weight" to "backbone.norm.weight"."""
    for ours, theirs in names:
        source, target = (theirs, ours) if to_ours else (ours, theirs)
        match = re.fullmatch(re.escape(source).replace(r"\{\}", "(.+)"), name)
        if match:
            return target.format(*match.groups())
    return None


def rotary(described: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 has one dict where published files have `rope_theta` and `rope_scaling`.

    Raises:
        KeyError: there is no rope_theta.
    """
    scaling = dict(described.get("rope_scaling") or {})
    kind = scaling.pop("type", None) or scaling.pop("rope_type", "default")
    return {"rope_parameters": {"rope_type": kind, **scaling, "rope_theta": described["rope_theta"]}}


def unrotary(backbone: Mapping[str, Any]) -> dict[str, Any]:
    """The published keys of `rotary`."""
    parameters = dict(backbone["rope_parameters"])
    theta, kind = parameters.pop("rope_theta"), parameters.pop("rope_type", "default")
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else {"type": kind, **parameters}}
