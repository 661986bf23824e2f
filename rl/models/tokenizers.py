"""Tokenizers of folders, hub names and tasks. No torch at import."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewards.causal_lm import load_causal_tokenizer
from rewards.weights import first_line
from rl.model_section import ModelConfig
from rl.models.families import family_of
from rl.models.folder import is_hub_name, is_url, local_folder, read_config, served_model
from rl.tasks.base import Task


def load_tokenizer(config: ModelConfig, task: Task) -> Any:
    """The tokenizer named by the config, the model folder's, or the task's character tokenizer.

    Raises:
        ValueError: none of them exists.
    """
    source = config.tokenizer or config.path
    if source == config.path and source is not None and is_url(source):
        source = str(served_model(source)["root"])
    if source is None:
        if task.alphabet is None:
            raise ValueError("model.tokenizer is required: this task does not bring its own alphabet")
        from rl.tasks.char_tokenizer import char_tokenizer

        return char_tokenizer(task.alphabet, getattr(task, "ends", True))
    # Only an autoregressive model may come in one file.
    if not config.autoregressive and not Path(source).is_dir() and not is_hub_name(source):
        raise ValueError(f"model.tokenizer or model.path {source!r} is not a folder")
    try:
        tokenizer = load_causal_tokenizer(source) if config.autoregressive else read_tokenizer(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer can be loaded from {source!r}: {first_line(error)}; set model.tokenizer"
        ) from error
    if config.eos_token is not None:
        if config.eos_token not in tokenizer.get_vocab():
            raise ValueError(f"model.eos_token {config.eos_token!r} is no token of the tokenizer")
        tokenizer.eos_token = config.eos_token
    if config.conditions:
        _add_conditions(tokenizer, config.conditions)
    return tokenizer


def read_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The tokenizer of a folder or hub name, without remote code.

    Raises:
        OSError, ValueError: there is none, or it needs code of its publisher's.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        described = read_config(str(source))
    except OSError:
        described = {}
    model_type = described.get("model_type")
    if model_type == "diffusion_lm":
        import rl.models.diffusion_lm  # noqa: F401  (registers the config that AutoTokenizer finds in the folder)

    if family_of(described) is None and (model_type is None or model_type in CONFIG_MAPPING):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    # These folders name code of the publisher's for what is an ordinary tokenizer: one file, or Qwen's two.
    folder = local_folder(str(source))
    one_file = (folder / "tokenizer.json").is_file()
    return (PreTrainedTokenizerFast if one_file else Qwen2Tokenizer).from_pretrained(folder)


def _add_conditions(tokenizer: Any, conditions: Mapping[str, str]) -> None:
    """Add the tokens of `model.conditions` (`rl/models/conditions.py`) to a tokenizer.

    Raises:
        ValueError: a condition is a token of the model already, or starts as one that the model has not.
    """
    known = set(tokenizer.get_vocab())
    for token, like in conditions.items():
        if token in known and token not in tokenizer.get_added_vocab():
            raise ValueError(f"model.conditions: {token!r} is a token of the model already, name a new one")
        if like not in known or like in conditions:
            raise ValueError(f"model.conditions: {token!r} is to start as {like!r}, which is no token of the model")
    tokenizer.add_tokens([token for token in conditions if token not in known])
