"""An autoregressive model, the baseline of evaluations (`model.autoregressive`), as the rest of a run knows models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import nn
from transformers.utils import logging

from rewards.causal_lm import load_causal_lm
from rl.model_section import ModelConfig
from rl.models.folder import is_url, served_model
from rollouts.engines.causal import NO_MASK
from rollouts.engines.server.options import ServerOptions


class CausalLM(nn.Module):
    """A causal language model, here or in a server.

    Attributes:
        lm: the model of transformers; None where a server has it.
        server: where that is; None where the model is here.
        max_length: positions of prompt and answer together.
    """

    attention, block_length, logit_shift, context_causal = "causal", 1, 1, True
    mask_token_id, excluded_token_ids = NO_MASK, ()

    def __init__(self, lm: Any, config: Any, max_length: int, server: ServerOptions | None = None):
        super().__init__()
        self.lm, self.config, self.max_length, self.server = lm, config, max_length, server


def load_autoregressive(config: ModelConfig, server: ServerOptions) -> CausalLM:
    """The model of `model.path`.

    Args:
        server: how to talk to a server; its address is `model.path`.

    Raises:
        ValueError: there is no such model, or an option is for diffusion models.
        EngineError: no server answers.
    """
    if config.path is None:
        raise ValueError("model.autoregressive needs model.path: the folder, hub name or .gguf file of a causal model")
    for name in ("family", "backbone", "conditions"):
        if getattr(config, name):
            raise ValueError(f"model.{name} is for diffusion models: take it out, or set model.autoregressive=false")
    if config.lora.rank:
        raise ValueError("model.lora is for models that are trained: take it out, or set model.autoregressive=false")
    if is_url(config.path):
        found = served_model(config.path)
        # What identifies weights that are not here.
        described = SimpleNamespace(_commit_hash=f"{found['root']}, vLLM {found['version']}")
        server = server.model_copy(update={"urls": [config.path.removesuffix("/").removesuffix("/v1")]})
        return CausalLM(None, described, int(found["max_model_len"]), server)
    logging.disable_progress_bar()
    lm = load_causal_lm(config.path, config.autoregressive_dtype)
    text = lm.config.get_text_config()
    # Mamba and its like have no last position.
    return CausalLM(lm, lm.config, getattr(text, "max_position_embeddings", None) or 2**31)
