"""Conditions: new prompt tokens that say what to generate.

Each starts with the embedding of a token that the model knows, so that the model answers to both in the same way until
the new one is trained. No condition is ever generated. The tokenizer gets them in `rl.models.tokenizers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from rl.models.diffusion_lm import DiffusionLM
from rl.models.lora import has_adapters


@torch.no_grad()
def add_to_model(model: Any, tokenizer: Any, conditions: Mapping[str, str]) -> None:
    """Copy the rows of tokens to those of the conditions that the model does not have yet; it grows where it must.

    Raises:
        ValueError: a model whose vocabulary is not ours to change, or whose embeddings are not trained.
    """
    if has_adapters(model):
        raise ValueError("model.conditions are new embeddings, which adapters leave alone: set model.lora.rank to 0")
    if not isinstance(model, DiffusionLM):
        raise ValueError(f"model.conditions needs a diffusion language model, not {type(model).__name__}")
    ids = tokenizer.convert_tokens_to_ids
    new = {ids(token): ids(like) for token, like in conditions.items() if token not in model.config.conditions}
    missing = max(new, default=-1) + 1 - model.vocab_size
    if missing > 0:
        model.grow(missing)
    tables: list[Any] = [model.get_input_embeddings(), model.lm_head]
    for table in tables:
        for row, like in new.items():
            table.weight[row] = table.weight[like]
    model.config.conditions = dict(conditions) | model.config.conditions
