"""Tokenizers of folders, hub names and tasks. No torch at import."""

from __future__ import annotations

import difflib
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rewards.causal_lm import PACKAGE, load_causal_tokenizer, plain_folder
from rewards.weights import first_line
from rl.model_section import ModelConfig
from rl.models.families import family_of
from rl.models.families.causal import CausalFamily
from rl.models.folder import is_hub_name, is_url, local_folder, read_config, served_model
from rl.tasks.base import Task


def load_tokenizer(config: ModelConfig, task: Task | None) -> Any:
    """The tokenizer named by the config, the model folder's, or the task's character tokenizer.

    Raises:
        ValueError: none of them exists.
    """
    source = config.tokenizer or config.path
    if source == config.path and source is not None and is_url(source):
        source = str(served_model(source)["root"])
    if source is None:
        if task is None or task.alphabet is None:
            raise ValueError("model.tokenizer is required: this task does not bring its own alphabet")
        from rl.tasks.char_tokenizer import char_tokenizer

        return char_tokenizer(task.alphabet, getattr(task, "ends", True))
    one_file = source.startswith(PACKAGE) or source.endswith(".gguf")
    if not (config.autoregressive or one_file or Path(source).is_dir() or is_hub_name(source)):
        raise ValueError(f"model.tokenizer or model.path {source!r} is not a folder")
    if not Path(source).exists() and is_hub_name(source) and _out_of_reach(source):
        raise ValueError(
            f"model.tokenizer or model.path {source!r} is no folder here and no download, and the hub cannot be "
            "reached: check the path"
        )
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
    if config.convert.block_length is not None and not config.autoregressive:
        _set_mask(tokenizer, config.convert.mask_token)
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

    family, source = family_of(described), plain_folder(source)
    ordinary = family is None or isinstance(family, CausalFamily)
    if ordinary and (model_type is None or model_type in CONFIG_MAPPING):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    # These folders name code of the publisher's for what is an ordinary tokenizer: one file, or Qwen's two.
    folder = local_folder(source)
    one_file = (folder / "tokenizer.json").is_file()
    return (PreTrainedTokenizerFast if one_file else Qwen2Tokenizer).from_pretrained(folder)


def _set_mask(tokenizer: Any, mask: int | str) -> None:
    """Give a tokenizer the mask token that `model.convert.mask_token` names.

    Raises:
        ValueError: it has no such token, or one that means something else already.
    """
    field = f"model.convert.mask_token {mask!r}"
    if mask == "new":
        if tokenizer.mask_token_id is None:
            tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
        return
    known = tokenizer.get_vocab()
    token = mask if isinstance(mask, str) else next((token for token, i in known.items() if i == mask), None)
    if token not in known:
        near = difflib.get_close_matches(str(mask), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "name an unused one, or new"
        raise ValueError(f"{field} is no token of the tokenizer: {hint}")
    if token in (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token):
        raise ValueError(f"{field} is the tokenizer's {token!r}, which texts use: name an unused one, or new")
    tokenizer.mask_token = token


def _out_of_reach(name: str) -> bool:
    """Whether the hub would be asked in vain for a name: libraries find out after retries of a minute."""
    from huggingface_hub import constants, try_to_load_from_cache

    # A proxy resolves names itself; offline, libraries answer at once.
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return False
    if any(try_to_load_from_cache(name, file) for file in ("config.json", "tokenizer_config.json", "tokenizer.json")):
        return False
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


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
