"""One decoder-only masked-diffusion language model on transformers' own backbones.

The backbone is any transformers decoder (Llama, Qwen2, Qwen3, GPT-2, ...) named by its config; this
class adds what makes it a diffusion model: the visibility (full or block-causal), the mask token that
can never be predicted (the SUBS parameterisation of MDLM, Sahoo et al. 2024), and the logit shift.
It saves and loads in Hugging Face format.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AutoConfig, AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

import rl.models.conv  # noqa: F401  (registers its backbone)
from rl.models import attention, routing
from rl.models.folder import block_length_message
from rl.models.joint_head import JointHead
from rl.models.rotary import rotate_in_float32
from rl.models.token_denoiser import TokenDenoiser
from rl.models.vision import Vision
from rollouts.samplers.distribution import Ranges
from rollouts.visibility import Pieces


class DiffusionLMConfig(PreTrainedConfig):
    """Config with the diffusion fields; `backbone` is a transformers config as a dict."""

    model_type = "diffusion_lm"

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        mask_token_id: int | None = None,
        attention: str = "full",
        block_length: int | None = None,
        logit_shift: int = 0,
        context_causal: bool = False,
        excluded_token_ids: Ranges = (),
        published: dict[str, Any] | None = None,
        family: str | None = None,
        conditions: dict[str, str] | None = None,
        rope_full_precision: bool = False,
        noise: str = "absorbing",
        context: dict[str, Any] | None = None,
        vision: dict[str, Any] | None = None,
        choices: int = 0,
        joint_head: bool = False,
        **kwargs: Any,
    ):
        self.backbone = backbone or {}
        self.excluded_token_ids = [list(r) for r in excluded_token_ids]
        # The config.json of the published checkpoint this model was loaded from, to export it again.
        self.published = published
        # What `model.family` said when it was loaded: adapters are loaded through it again.
        self.family = family
        # Prompt tokens added to the vocabulary, see `rl/models/conditions.py`.
        self.conditions = conditions or {}
        # Rotate queries and keys in float32 whatever the weights' dtype (LLaDA).
        self.rope_full_precision = rope_full_precision
        # The `model.context` it was stretched by, which its backbone has in it.
        self.context = context
        # Settings of the vision tower in front of it (`rl.models.vision.Vision`), None for a model of text alone.
        self.vision = vision
        # Values between which its `choice_head` chooses; 0 is no head.
        self.choices = choices
        # Whether it has a `rl.models.joint_head.JointHead`.
        self.joint_head = joint_head
        self.mask_token_id = mask_token_id
        self.attention = attention
        self.block_length = block_length
        self.logit_shift = logit_shift
        # Clean tokens see only clean tokens to their left, also inside their block (NBDiff's context-causal mask).
        self.context_causal = context_causal
        # What noise makes of a token: the mask ("absorbing") or a random token ("uniform").
        self.noise = noise
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    def check(self) -> None:
        """Raise ValueError naming the field that makes this no usable diffusion model."""
        if "model_type" not in self.backbone:
            raise ValueError("model.backbone needs model_type, for example gpt2, llama, qwen2 or qwen3")
        if self.attention not in ("full", "block_causal"):
            raise ValueError(f"model.attention must be full or block_causal, got {self.attention!r}")
        if (self.attention == "block_causal") != (self.block_length is not None):
            raise ValueError(block_length_message(self.attention))
        if self.logit_shift not in (0, 1):
            raise ValueError(f"model.logit_shift must be 0 or 1, got {self.logit_shift}")
        if self.context_causal and self.attention == "full":
            raise ValueError("model.context_causal needs attention block_causal: full attention has no context")
        if self.noise not in ("absorbing", "uniform"):
            raise ValueError(f"model.noise must be absorbing or uniform, got {self.noise!r}")
        if self.noise == "uniform" and self.attention != "full":
            raise ValueError("model.noise uniform needs model.attention full: every step draws the whole response")
        vocab_size = self.backbone.get("vocab_size")
        if self.mask_token_id is None or (vocab_size and not 0 <= self.mask_token_id < vocab_size):
            raise ValueError(
                f"model.mask_token_id must lie in the vocabulary of {vocab_size}, got {self.mask_token_id}"
            )


class DiffusionLM(TokenDenoiser, PreTrainedModel):
    """A `rollouts.model_protocol.DenoisingModel`.

    Built with `attn_implementation="flex_attention"` (GPU only), the learner's forwards get their visibility
    as a FlexAttention block mask; all else runs PyTorch's scaled dot-product attention.
    """

    config_class = DiffusionLMConfig
    base_model_prefix = "backbone"
    _supports_sdpa = True
    _supports_flex_attn = True
    supports_gradient_checkpointing = True

    def __init__(self, config: DiffusionLMConfig):
        super().__init__(config)
        config.check()
        if config._attn_implementation not in ("sdpa", "flex_attention"):
            raise ValueError(f"attn_implementation must be sdpa or flex_attention, got {config._attn_implementation!r}")
        # is_causal in the config is what turns transformers' backbones bidirectional.
        backbone_config = AutoConfig.for_model(**{**config.backbone, "is_causal": False, "use_cache": False})
        self.backbone = _body(backbone_config, config.rope_full_precision)
        self.lm_head = nn.Linear(backbone_config.hidden_size, backbone_config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            table = next(n for n, m in self.backbone.named_modules() if m is self.backbone.get_input_embeddings())
            self.lm_head.weight = self.backbone.get_input_embeddings().weight
            self._tied_weights_keys = {"lm_head.weight": f"backbone.{table}.weight"}
        self.choice_head = nn.Linear(backbone_config.hidden_size, config.choices) if config.choices else None
        self.joint_head = self._new_joint_head() if config.joint_head else None
        self.vision = None if config.vision is None else Vision(config.vision, backbone_config.hidden_size)
        self.post_init()

    body = property(attrgetter("backbone"))
    head = property(attrgetter("lm_head"))
    mask_token_id = property(attrgetter("config.mask_token_id"))
    attention = property(attrgetter("config.attention"))
    block_length = property(attrgetter("config.block_length"))
    logit_shift = property(attrgetter("config.logit_shift"))
    context_causal = property(attrgetter("config.context_causal"))
    noise = property(attrgetter("config.noise"))
    max_length = property(attrgetter("backbone.config.max_position_embeddings"))
    excluded_token_ids = property(attrgetter("config.excluded_token_ids"))
    vocab_size = property(attrgetter("lm_head.out_features"))
    hidden_size = property(attrgetter("lm_head.in_features"))

    # Rows of several documents may come with `rollouts.visibility.Pieces`.
    takes_pieces = True

    @property
    def wants_block_mask(self) -> bool:
        """Whether the learner should describe visibility by a FlexAttention block mask."""
        return self.config._attn_implementation == "flex_attention"

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def exclude(self, ranges: Ranges) -> None:
        """Never predict these ids, besides the mask token; see `rl/models/vocabulary.py`."""
        self.config.excluded_token_ids = [list(r) for r in ranges]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Tensors as they are in memory; transformers alone would write experts one by one."""
        super().save_pretrained(*args, **{"save_original_format": False, **kwargs})

    def adopt(self, described: Mapping[str, Any]) -> None:
        """Take over the settings in the config.json of a saved policy."""
        self.config.block_length = described["block_length"]
        self.exclude(described["excluded_token_ids"])

    def choose_between(self, count: int) -> None:
        """Add a head that chooses between so many values, all equally likely; one that is there stays.

        Raises:
            ValueError: there is one for another number.
        """
        if self.config.choices not in (0, count):
            raise ValueError(f"model.choices is {count}, and the model chooses between {self.config.choices} already")
        if self.choice_head is None:
            like = self.lm_head.weight
            self.choice_head = nn.Linear(self.hidden_size, count, dtype=like.dtype, device=like.device)
            self.config.choices = count
            for parameter in self.choice_head.parameters():
                nn.init.zeros_(parameter)

    def choice_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., D] -> [..., choices] in at least float32."""
        assert self.choice_head is not None
        logits = self.choice_head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def add_joint_head(self, seed: int) -> None:
        """Add a joint head that changes nothing yet; one that is there stays."""
        if self.joint_head is None:
            torch.manual_seed(seed)
            like = self.lm_head.weight
            self.joint_head = self._new_joint_head().to(like.device, like.dtype).eval()
            nn.init.zeros_(self.joint_head.out.weight)
            self.config.joint_head = True

    def _new_joint_head(self) -> JointHead:
        described: Any = copy.deepcopy(self.backbone.config)
        described.num_hidden_layers = 1
        if getattr(described, "layer_types", None):
            described.layer_types = described.layer_types[:1]
        layer = _body(described, self.config.rope_full_precision)
        # It is only given embeddings.
        table = layer.get_input_embeddings()
        layer.set_submodule(next(name for name, module in layer.named_modules() if module is table), nn.Identity())
        return JointHead(layer, self.hidden_size)

    def joint_states(
        self,
        hidden: torch.Tensor,
        input_ids: torch.Tensor,
        shown: torch.Tensor,
        *,
        visible: torch.Tensor | BlockMask | Pieces | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`JointHead.forward` for tokens int64 [B, W]; the rest as the forward that gave `hidden` had it."""
        assert self.joint_head is not None
        how = self._how(visible, hidden.shape[1]) | {"position_ids": position_ids, "use_cache": False}
        return self.joint_head(hidden, self.get_input_embeddings()(input_ids), shown, **how)

    @torch.no_grad()
    def grow(self, num_tokens: int) -> None:
        """Append tokens to the vocabulary, all of them zeros in embedding and head."""
        embedding: Any = self.get_input_embeddings()
        tied = embedding.weight is self.lm_head.weight
        for table in (embedding, self.lm_head):
            table.weight = nn.Parameter(torch.cat([table.weight, table.weight.new_zeros(num_tokens, self.hidden_size)]))
        if tied:
            self.lm_head.weight = embedding.weight
        self.lm_head.out_features += num_tokens
        embedding.num_embeddings += num_tokens
        backbone: Any = self.backbone
        backbone.config.vocab_size += num_tokens
        self.config.backbone = {**self.config.backbone, "vocab_size": self.vocab_size}

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        *,
        visible: torch.Tensor | BlockMask | Pieces | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, Q, D]; see `DenoisingModel.hidden_states`.

        Raises:
            ValueError: FlexAttention on the CPU.
        """
        if self.wants_block_mask and input_ids.device.type == "cpu":
            raise ValueError(
                "attn_implementation flex_attention needs a GPU (it has no backward on the CPU): use sdpa there"
            )
        if self.vision is not None and inputs_embeds is None:
            inputs_embeds = self.vision.embed(input_ids, self.get_input_embeddings())
        return self.backbone(
            input_ids=input_ids if inputs_embeds is None else None,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            **self._how(visible, input_ids.shape[1]),
        ).last_hidden_state

    def _how(self, visible: torch.Tensor | BlockMask | Pieces | None, num_queries: int) -> dict[str, Any]:
        """Visibility, as arguments of a transformers body."""
        if isinstance(visible, Pieces):
            return {"attention_mask": attention.additive(visible.visible, self.dtype), "pieces": visible}
        if isinstance(visible, torch.Tensor):
            # The kernel takes one row of the mask for all queries only with its query axis spelled out.
            return {"attention_mask": attention.additive(visible, self.dtype).expand(-1, -1, num_queries, -1)}
        return {"attention_mask": visible}


def _body(described: Any, rope_full_precision: bool) -> Any:
    """A transformers model of this config with our attention, experts and rotation."""
    # Built as sdpa first: transformers then refuses backbones whose attention is not interchangeable.
    body = AutoModel.from_config(described, attn_implementation="sdpa")
    body.set_attn_implementation(attention.NAME)
    routing.prepare(body)
    if rope_full_precision:
        rotate_in_float32(body.rotary_emb)
    return body


AutoConfig.register("diffusion_lm", DiffusionLMConfig)
