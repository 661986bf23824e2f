"""A published checkpoint layout: how its config.json and its tensors become a `DiffusionLM`, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple


class Part(NamedTuple):
    """The part of a tensor in memory that a tensor of the file, or a piece of it, holds.

    Attributes:
        at: index into the tensor in memory; `...` is all of it. Example: (3, slice(0, 64)) is the first 64 rows of
            expert 3, where memory stacks experts that the file has one by one.
        piece: number of the piece, where the file joins several along its first axis. Example: 0, 1 and 2 for the
            query, key and value weights of a fused qkv_proj.
    """

    at: Any = ...
    piece: int = 0


# transformers' own names for the numbers of a decoder; most published files have the same.
SIZES = {
    key: key
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
    )
}


class Family:
    """A published layout. The defaults are those of a decoder that transformers could have published.

    Attributes:
        model_type, architecture: as in its config.json.
        backbone: model_type of the transformers decoder it is built on.
        attention, logit_shift, noise: as of `DiffusionLM`.
        keys: key of config.json -> key of the backbone's config, where both mean the same.
        constants: keys of config.json that this reading depends on, with the only value it holds for. A key that is
            absent or null counts as having it.
        defaults: keys that the published config.json leaves out, with what they are then.
        template: keys written into the config.json of a model that did not come from a published one.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    backbone: ClassVar[str]
    attention: ClassVar[str] = "full"
    logit_shift: ClassVar[int] = 0
    noise: ClassVar[str] = "absorbing"
    keys: ClassVar[Mapping[str, str]] = SIZES
    constants: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu", "use_sliding_window": False}
    defaults: ClassVar[Mapping[str, Any]] = {}
    template: ClassVar[Mapping[str, Any]] = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": False}

    @property
    def name(self) -> str:
        """Its name in messages."""
        return type(self).__name__.lower()

    def reads(self, described: Mapping[str, Any]) -> bool:
        """Whether a config.json is of this layout."""
        return bool(described.get("model_type") == self.model_type)

    def read(self, described: Mapping[str, Any]) -> dict[str, Any]:
        """The backbone's transformers config from a published config.json.

        Raises:
            KeyError: a key is missing.
        """
        return {ours: described[theirs] for theirs, ours in self.keys.items()} | {
            "hidden_act": "silu",
            "rope_parameters": rotary(described),
        }

    def write(self, backbone: Mapping[str, Any]) -> dict[str, Any]:
        """The published keys of a backbone's transformers config."""
        return {theirs: backbone[ours] for theirs, ours in self.keys.items()} | unrotary(backbone["rope_parameters"])

    def places(self, name: str, shape: tuple[int, ...]) -> Mapping[str, Part]:
        """The tensors of the file that hold a tensor of `DiffusionLM`, and which part of it each holds.

        Args:
            name: in memory, "backbone.layers.0.mlp.up_proj.weight".
            shape: in memory.

        Returns:
            {name in the file: part}; empty when the layout has no place for it.
        """
        if name.startswith("backbone."):
            return {name.replace("backbone.", "model.", 1): Part()}
        return {name: Part()}

    def vision(self, described: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """The settings of a vision tower (`rl.models.vision.Vision`) from a published config.json; None without one."""
        return None

    def fields(self, described: Mapping[str, Any], block_length: int | None = None) -> dict[str, Any]:
        """Arguments of our `DiffusionLMConfig` from a published config.json.

        Args:
            block_length: overrides the file's `block_size`; block-causal families only.

        Raises:
            ValueError: a key is missing, or has a value that this layout is not read with.
        """
        layout, published = f"the {self.name} layout", dict(described)
        if not self.reads(described):
            raise ValueError(f"config.json says model_type {described.get('model_type')!r}, which is not {layout}")
        described = {**self.defaults, **described}
        for key, value in self.constants.items():
            if described.get(key) not in (None, value):
                raise ValueError(f"config.json says {key} {described[key]!r}, {layout} is read with {value!r} only")
        try:
            backbone = self.read(described)
            mask_token_id = described["mask_token_id"]
        except KeyError as error:
            raise ValueError(f"config.json has no {error}, which {layout} needs") from None
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
            "published": published,
        }

    def describe(self, config: Any, backbone: Any, dtype: str) -> dict[str, Any]:
        """The published config.json of one of our models: the one it was loaded from, brought up to date.

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
        ours = backbone.to_dict()
        now = {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "mask_token_id": config.mask_token_id,
            "tie_word_embeddings": config.tie_word_embeddings,
            **({"block_size": config.block_length} if self.attention == "block_causal" else {}),
            **self.write(ours),
        }
        if "rope_parameters" in before:
            now = {k: v for k, v in now.items() if not k.startswith("rope_")}
            now["rope_parameters"] = ours["rope_parameters"]
        # A key that the published file leaves at its default stays left out.
        absent = self.defaults
        said = {k for k, v in now.items() if (v != absent[k] if k in absent else v is not None and v is not False)}
        described = before | {k: v for k, v in now.items() if k in before or k in said}
        for key, value in self.read(described).items():
            if ours.get(key) != value:
                raise ValueError(f"--layout {self.name} has no place for the backbone's {key} {ours.get(key)!r}")
        key = "dtype" if "dtype" in described else "torch_dtype"
        if key in described or before is not config.published:
            described[key] = dtype
        return described


def rotary(described: Mapping[str, Any]) -> dict[str, Any]:
    """transformers 5 has one dict, `rope_parameters`, where older files have `rope_theta` and `rope_scaling`.

    Raises:
        KeyError: there is neither.
    """
    if described.get("rope_parameters"):
        return dict(described["rope_parameters"])
    scaling = dict(described.get("rope_scaling") or {})
    kind = scaling.pop("type", None) or scaling.pop("rope_type", "default")
    return {"rope_type": kind, **scaling, "rope_theta": described["rope_theta"]}


def unrotary(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The older keys of `rope_parameters`."""
    rest = dict(parameters)
    theta, kind = rest.pop("rope_theta"), rest.pop("rope_type", "default")
    return {"rope_theta": theta, "rope_scaling": None if kind == "default" else {"type": kind, **rest}}
