"""Autoregressive models of transformers, which `model.convert` makes diffusion models of.

The weights stay what they are. With `readout: shifted` and `context: causal` the model is at block length 1 the
autoregressive one, logit by logit; larger blocks are what the convert stage teaches it. SDAR (arXiv 2510.06303) reads
unshifted with block context, NBDiff (arXiv 2512.06776) shifted with causal context.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from rl.model_section import ConvertOptions
from rl.models.families.family import Family, Part

# Key of config.json that keeps `model.convert` in a folder of the autoregressive layout.
SETTINGS = "denoise_rl"

# Keys of config.json that say nothing of the network, or that we decide.
_NOT_OF_THE_BACKBONE = (
    "architectures", "auto_map", "bos_token_id", "dtype", "id2label", "label2id", "pad_token_id", "quantization_config",
    "tie_word_embeddings", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache", SETTINGS,
)  # fmt: skip

# Keys that only a model with another forward than ours sets: key -> what it has.
_NOT_IMPLEMENTED = {
    "sliding_window": "sliding windows",
    "attn_logit_softcapping": "soft caps of attention",
    "final_logit_softcapping": "soft caps of logits",
}


# Kinds that are often asked for, and what of them is missing.
_UNREAD = dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), ": its sliding windows and soft caps are not implemented")


def settings_of(described: Mapping[str, Any]) -> ConvertOptions:
    """`model.convert` of a converted model, from the fields of its `DiffusionLMConfig`."""
    full = described["attention"] == "full"
    return ConvertOptions(
        block_length=described["block_length"] or 1,
        mask_token=described["mask_token_id"],
        readout="shifted" if described["logit_shift"] else "unshifted",
        context="full" if full else "causal" if described["context_causal"] else "block",
    )


class CausalFamily(Family):
    """A causal language model of transformers under its own names.

    Attributes:
        inner: what the weights of the body are called in the file; head: the head's.
    """

    attention = "block_causal"
    inner: ClassVar[str] = "model."
    head: ClassVar[str] = "lm_head."

    def read(self, described: Mapping[str, Any]) -> dict[str, Any]:
        """The backbone's transformers config.

        Raises:
            ValueError: its forward has parts that are not implemented here.
        """
        from transformers import AutoConfig

        kept = {key: value for key, value in described.items() if key not in _NOT_OF_THE_BACKBONE}
        kept |= {key: 0.0 for key in kept if key.endswith(("dropout", "pdrop"))}
        config = AutoConfig.for_model(**kept)
        extras = [what for key, what in _NOT_IMPLEMENTED.items() if getattr(config, key, None) is not None]
        if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
            extras.append("layers that are not full attention")
        if extras:
            raise ValueError(f"this {self.model_type} has {' and '.join(extras)}, which are not implemented")
        return kept | {key: getattr(config, key) for key in ("vocab_size", "max_position_embeddings")}

    def places(self, name: str, shape: tuple[int, ...]) -> Mapping[str, Part]:
        ours, theirs = ("backbone.", self.inner) if name.startswith("backbone.") else ("lm_head.", self.head)
        return {name.replace(ours, theirs, 1): Part()}

    def fields(
        self,
        described: Mapping[str, Any],
        block_length: int | None = None,
        convert: ConvertOptions | None = None,
        mask_token_id: int | None = None,
    ) -> dict[str, Any]:
        """See `Family.fields`.

        Args:
            convert: `model.convert`; None takes what an exported folder says.
            mask_token_id: the tokenizer's; None takes `convert.mask_token`.

        Raises:
            ValueError: there is no `model.convert`, or this model cannot be converted.
        """
        if convert is None or convert.block_length is None:
            convert = ConvertOptions(**described.get(SETTINGS, {}))
        if convert.block_length is None:
            raise ValueError(
                f"{self.model_type} is an autoregressive model: set model.convert.block_length to make a diffusion "
                "model of it"
            )
        backbone = self.read(described)
        if mask_token_id is None:
            mask_token_id = convert.mask_token if isinstance(convert.mask_token, int) else None
        positions = backbone.get("max_position_embeddings")
        block = block_length or convert.block_length
        if positions is not None and block > positions:
            raise ValueError(f"model.convert.block_length {block} is longer than the model's {positions} positions")
        full = convert.context == "full"
        return {
            "backbone": backbone,
            "mask_token_id": mask_token_id,
            "attention": "full" if full else "block_causal",
            "block_length": None if full else block,
            "logit_shift": int(convert.readout == "shifted"),
            "context_causal": convert.context == "causal",
            "tie_word_embeddings": described.get("tie_word_embeddings", self._ties()),
            "published": dict(described),
        }

    def _ties(self) -> bool:
        """Whether head and embedding are one where config.json does not say: files leave out what is the default."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        return bool(CONFIG_MAPPING[self.model_type]().tie_word_embeddings)

    def describe(self, config: Any, backbone: Any, dtype: str) -> dict[str, Any]:
        """The autoregressive config.json; `model.convert` stands under a key of ours that transformers ignores."""
        if backbone.model_type != self.model_type:
            kind = backbone.model_type
            raise ValueError(f"--layout {self.name} needs backbone {self.model_type}, the model has {kind}")
        before = config.published or {}
        if before.get("model_type") != self.model_type:
            before = {k: v for k, v in backbone.to_dict().items() if k not in _NOT_OF_THE_BACKBONE}
        now = {
            "architectures": [self.architecture],
            "vocab_size": backbone.vocab_size,
            "tie_word_embeddings": config.tie_word_embeddings,
            "dtype": dtype,
            SETTINGS: settings_of(config.to_dict()).model_dump(),
        }
        return {key: value for key, value in before.items() if key != "torch_dtype"} | now


def causal_family(family: Family | None, described: Mapping[str, Any], convert: ConvertOptions) -> CausalFamily | None:
    """The family of a config.json where it is an autoregressive one.

    Raises:
        ValueError: `model.convert` is set for a model that is none, or none that can be converted.
    """
    if isinstance(family, CausalFamily):
        return family
    kind = described.get("model_type")
    if convert.block_length is not None or kind in _UNREAD:
        known = ", ".join(sorted(c.model_type for c in CausalFamily.__subclasses__()))
        raise ValueError(
            f"config.json says model_type {kind!r}, and model.convert is for {known}{_UNREAD.get(str(kind), '')}"
        )
    return None


class Llama(CausalFamily):
    model_type = backbone = "llama"
    architecture = "LlamaForCausalLM"


class Qwen2(CausalFamily):
    model_type = backbone = "qwen2"
    architecture = "Qwen2ForCausalLM"


class Qwen3(CausalFamily):
    model_type = backbone = "qwen3"
    architecture = "Qwen3ForCausalLM"


class Mistral(CausalFamily):
    model_type = backbone = "mistral"
    architecture = "MistralForCausalLM"


class Gemma(CausalFamily):
    model_type = backbone = "gemma"
    architecture = "GemmaForCausalLM"


class GPTNeoX(CausalFamily):
    model_type = backbone = "gpt_neox"
    architecture = "GPTNeoXForCausalLM"
    inner = "gpt_neox."
    head = "embed_out."
