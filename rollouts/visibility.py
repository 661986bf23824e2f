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


def block_causal_visibility(
    query_position: torch.Tensor, num_keys: int, block_length: int, causal_before: torch.Tensor | None = None
) -> torch.Tensor:
    """Block-causal attention on the grid anchored at position 0: a query sees up to its block's end.

    Example with blocks of 2 and `causal_before` 2: positions 0 to 3 see 1, 2, 4 and 4 keys; without it 2, 2, 4 and 4.

    Args:
        query_position: int64 [B, Q], absolute positions.
        num_keys: K; key k stands at absolute position k.
        causal_before: int64 [B, 1], for a context-causal model: a query before this position is a clean token and sees
            up to itself only.

    Returns:
        bool [B, Q, K].
    """
    seen = (query_position // block_length + 1) * block_length
    if causal_before is not None:
        seen = torch.where(query_position < causal_before, query_position + 1, seen)
    return torch.arange(num_keys, device=query_position.device) < seen[..., None]
