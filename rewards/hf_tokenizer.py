"""Load the tokenizer that was saved. Imports transformers only when called."""

from __future__ import annotations

from typing import Any

GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or hub name.

    transformers 5 replaces a tokenizer saved without a class of its own by the class of the *model* beside it
    (`AutoTokenizer` makes a Qwen2Tokenizer of any tokenizer in a Qwen2 folder), which then splits text its own way
    without a word. Such tokenizers are loaded from their `tokenizer.json` as it stands.

    Raises:
        OSError: when there is no tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if get_tokenizer_config(name).get("tokenizer_class") in GENERIC:
        return PreTrainedTokenizerFast.from_pretrained(name)
    return AutoTokenizer.from_pretrained(name)
