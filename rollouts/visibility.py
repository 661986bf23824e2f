"""Which key a query may look at, as boolean masks: one definition for sampler, learner and tests."""

from __future__ import annotations

import torch


def full_visibility(lengths: torch.Tensor, width: int) -> torch.Tensor | None:
    """Full attention over right-padded rows.

    Args:
        lengths: int64 [B], valid positions of each row.
        width: padded length K.

    Returns:
        bool [B, 1, K] (broadcasts over queries), or None when nothing is padded.
    """
    if bool((lengths == width).all()):
        return None
    return (torch.arange(width, device=lengths.device) < lengths[:, None])[:, None, :]


def block_causal_visibility(query_position: torch.Tensor, num_keys: int, block_length: int) -> torch.Tensor:
    """Block-causal attention on the grid anchored at position 0: a query sees up to its block's end.

    Args:
        query_position: int64 [B, Q], absolute positions.
        num_keys: K; key k stands at absolute position k.

    Returns:
        bool [B, Q, K].
    """
    block_end = (query_position // block_length + 1) * block_length
    return torch.arange(num_keys, device=query_position.device) < block_end[..., None]
