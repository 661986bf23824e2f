"""The tokens that a policy may predict.

Three kinds are excluded: the mask token, since a prediction is a decision; ids that the tokenizer does not know, since
they cannot be decoded (published embeddings are padded with such ids); and those of `model.never_generate`. Excluded
tokens have probability 0 in sampler and learner alike, so the policy is a distribution over the other tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rl.tasks.chat import token_ids
from rollouts.constraints.automaton import TokenAutomaton
from rollouts.constraints.compile import Tokens, compile_constraint
from rollouts.samplers.sub_options import ConstraintOptions


def as_ranges(ids: Iterable[int]) -> list[list[int]]:
    """Token ids as sorted half-open ranges. Example: {3, 1, 2, 9} -> [[1, 4], [9, 10]]."""
    ranges: list[list[int]] = []
    for i in sorted(set(ids)):
        if ranges and ranges[-1][1] == i:
            ranges[-1][1] = i + 1
        else:
            ranges.append([i, i + 1])
    return ranges


def excluded_ranges(tokenizer: Any, vocab_size: int, never_generate: Sequence[int | str]) -> list[list[int]]:
    """Ids that the tokenizer cannot decode, and those that the user forbids, as ranges.

    Args:
        vocab_size: ids the model's head has.
        never_generate: ids, token strings, or "special" for all special tokens of the tokenizer.

    Raises:
        ValueError: the tokenizer has ids that the model has not, or a named token does not exist.
    """
    known = set(tokenizer.get_vocab().values())
    if max(known, default=0) >= vocab_size:
        raise ValueError(
            f"model.tokenizer knows token id {max(known)} and the model has a vocabulary of {vocab_size}: "
            "set model.tokenizer to the model's own"
        )
    excluded = set(range(vocab_size)) - known
    for token in never_generate:
        if token == "special":
            excluded |= set(tokenizer.all_special_ids)
            continue
        i = token if isinstance(token, int) else tokenizer.get_vocab().get(token)
        if i is None or not 0 <= i < vocab_size:
            raise ValueError(f"model.never_generate names {token!r}, which is no token of the tokenizer")
        excluded.add(i)
    return as_ranges(excluded)


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """The bytes that every token but the special ones adds to a decoded text.

    Raises:
        ValueError: what a token adds depends on its neighbours (WordPiece, words joined by spaces).
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    backend = tokenizer.backend_tokenizer
    described = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": "none"}
    kinds = {part["type"] for part in described.get("decoders", [described])}
    literal = tokenizer.get_added_vocab()
    if "ByteLevel" in kinds:
        byte = {character: value for value, character in bytes_to_unicode().items()}

        def read(token: str) -> bytes:
            return bytes(byte[character] for character in token)
    elif "ByteFallback" in kinds or "Metaspace" in kinds:

        def read(token: str) -> bytes:
            if re.fullmatch("<0x[0-9A-F]{2}>", token):
                return bytes([int(token[3:5], 16)])
            return token.replace("\u2581", " ").encode()
    elif kinds == {"Fuse"}:

        def read(token: str) -> bytes:
            return token.encode()
    else:
        raise ValueError(
            f"sampler.constraint needs a tokenizer whose tokens are pieces of text, and this one's decoder is "
            f"{', '.join(sorted(kinds))}: use a byte-level, sentencepiece or character tokenizer"
        )
    special = set(tokenizer.all_special_ids)
    return {
        index: token.encode() if token in literal else read(token)
        for token, index in tokenizer.get_vocab().items()
        if index not in special
    }


def first_bytes(tokenizer: Any, texts: Mapping[int, bytes]) -> dict[int, bytes]:
    """The bytes of tokens that lose a space as the first of a text, as sentencepiece's decoders let them."""
    decoder, names = tokenizer.backend_tokenizer.decoder, {i: token for token, i in tokenizer.get_vocab().items()}
    spaced = {index: decoder.decode([names[index]]).encode() for index, text in texts.items() if text.startswith(b" ")}
    return {index: text for index, text in spaced.items() if text != texts[index]}


def compiled_constraint(
    options: ConstraintOptions, tokenizer: Any, excluded: Iterable[Sequence[int]]
) -> TokenAutomaton:
    """The automaton of a constraint for a tokenizer.

    Args:
        excluded: half-open ranges of ids that the model cannot predict.

    Raises:
        ValueError: see `rollouts.constraints.compile.compile_constraint`.
    """
    ids, texts = tokenizer.get_vocab(), token_bytes(tokenizer)
    ranges = [np.arange(start, stop) for start, stop in excluded]
    return compile_constraint(
        options,
        Tokens(
            texts=texts,
            first=first_bytes(tokenizer, texts),
            vocab_size=max(ids.values()) + 1,
            ids=ids,
            encode=lambda text: token_ids(tokenizer, [text])[0],
            end=tokenizer.eos_token_id,
            pad=tokenizer.pad_token_id,
            excluded=np.concatenate([*ranges, [-1 if tokenizer.mask_token_id is None else tokenizer.mask_token_id]]),
        ),
    )
