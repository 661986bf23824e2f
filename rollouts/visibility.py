"""Which key a query may look at, as boolean masks: one definition for sampler, learner and tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch


class Pieces(NamedTuple):
    """Visibility of rows [R, W] that hold several documents: attention is computed document by document.

    A row of 8 documents of 100 tokens has 640,000 pairs of a query and a key, of which 80,000 lie inside documents. The
    other ones are never computed. D documents, Q the most queries and K the most keys of one.

    Attributes:
        query: int64 [D, Q], places row * W + column; a shorter document repeats its first.
        key: int64 [D, K], the places that its queries may look at.
        visible: bool [D, Q, K], True where a query sees a key.
        back: int64 [R * W], where in [D * Q] the output of each place stands; padding gets what stands first.
    """

    query: torch.Tensor
    key: torch.Tensor
    visible: torch.Tensor
    back: torch.Tensor

    @classmethod
    def of(
        cls, queries: Sequence[np.ndarray], keys: Sequence[np.ndarray], shape: tuple[int, int], rule: Any, device: Any
    ) -> Pieces:
        """Pieces of documents whose places are known.

        Args:
            rule: (row, head, query column, key column) -> bool, as FlexAttention's.
        """
        query, key = _padded(queries), _padded(keys)
        real = np.arange(key.shape[1]) < np.array([len(own) for own in keys])[:, None]
        back = np.zeros(shape[0] * shape[1], dtype=np.int64)
        for index, own in enumerate(queries):
            back[own] = index * query.shape[1] + np.arange(len(own))
        q, k, b = (torch.from_numpy(places).to(device) for places in (query, key, back))
        head = torch.zeros((), dtype=torch.int64, device=device)
        width = shape[1]
        visible = rule((q[:, :1] // width)[..., None], head, (q % width)[:, :, None], (k % width)[:, None, :])
        return cls(q, k, visible & torch.from_numpy(real).to(device)[:, None, :], b)


def _padded(places: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [D, longest], filled up with the first place of each."""
    out = np.array([own[0] for own in places])[:, None].repeat(max(map(len, places)), axis=1)
    for row, own in zip(out, places, strict=True):
        row[: len(own)] = own
    return out


def full_visibility(lengths: torch.Tensor, width: int, shortest: int | None = None) -> torch.Tensor | None:
    """Full attention over right-padded rows.

    Args:
        lengths: int64 [B], valid positions of each row.
        width: padded length K.
        shortest: the smallest length, where the host knows it: nothing waits for the device then.

    Returns:
        bool [B, 1, K] (broadcasts over queries), or None when nothing is padded.
    """
    if (shortest if shortest is not None else int(lengths.min())) == width:
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
