"""The tokens that a policy may predict.

Three kinds are excluded: the mask token, since a prediction is a decision; ids that the tokenizer does not know, since
they cannot be decoded (published embeddings are padded with such ids); and those of `model.never_generate`. Excluded
tokens have probability 0 in sampler and learner alike, so the policy is a distribution over the other tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


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
