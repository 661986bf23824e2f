"""An autoregressive model, the baseline of evaluations (`model.autoregressive`), as the rest of a run knows models."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoConfig
from transformers.utils import logging

from rewards.causal_lm import load_causal_lm, resolve
from rewards.weights import first_line
from rl.model_section import ModelConfig
from rollouts.engines.causal import NO_MASK


class CausalLM(nn.Module):
    """A causal language model of transformers.

    Attributes:
        lm: the model; None where servers have it.
        max_length, vocab_size: of the model.
    """

    attention, block_length, logit_shift, context_causal = "causal", 1, 1, True
    mask_token_id, excluded_token_ids = NO_MASK, ()

    def __init__(self, config: Any, lm: nn.Module | None):
        super().__init__()
        self.config, self.lm = config, lm
        text = config.get_text_config()
        self.vocab_size = text.vocab_size
        # Mamba and its like have no last position.
        self.max_length: int = getattr(text, "max_position_embeddings", None) or 2**31


def load_autoregressive(config: ModelConfig, served: bool) -> CausalLM:
    """The model of `model.path`; only its config where servers have the weights.

    Raises:
        ValueError: there is no such model, or an option is for diffusion models.
    """
    if config.path is None:
        raise ValueError("model.autoregressive needs model.path: the folder, hub name or .gguf file of a causal model")
    for name in ("family", "backbone", "conditions"):
        if getattr(config, name):
            raise ValueError(f"model.{name} is for diffusion models: take it out, or set model.autoregressive=false")
    if config.lora.rank:
        raise ValueError("model.lora is for models that are trained: take it out, or set model.autoregressive=false")
    logging.disable_progress_bar()
    if not served:
        lm = load_causal_lm(config.path)
        return CausalLM(lm.config, lm)
    try:
        return CausalLM(AutoConfig.from_pretrained(resolve(config.path)), None)
    except (OSError, ValueError) as error:
        raise ValueError(f"it has no readable config.json: {first_line(error)}") from error
