"""The tokens that a policy may predict.

Three kinds are excluded: the mask token, since a prediction is a decision; ids that the tokenizer does not know, since
they cannot be decoded (published embeddings are padded with such ids); and those of `model.never_generate`. Excluded
tokens have probability 0 in sampler and learner alike, so the policy is a distribution over the other tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

# Low enough to underflow to probability 0 in every dtype, high enough to survive a division by a temperature.
_NEVER = -1e9

# Half-open ranges of token ids. Example: [[0, 4], [126349, 126464]].
Ranges = Sequence[Sequence[int]]


def exclude_(logits: torch.Tensor, mask_token_id: int, excluded: Ranges) -> torch.Tensor:
    """Logits [..., V] in at least float32 in which the mask token and the excluded ranges cannot win.

    The argument is changed in place if it is float32 already: nobody else holds a head's output, and it is the largest
    tensor of a forward.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    never = torch.zeros(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    never[mask_token_id] = _NEVER
    for start, stop in excluded:
        never[start:stop] = _NEVER
    return logits.add_(never)


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
