"""The sets of tokens that a constraint left to each decision, as the rollouts recorded them.

A token keeps the set of its own draw in whatever state an estimator scores it: under a constraint no position is drawn
twice. In the state in which it was drawn, as in the trace, its log-prob is then exactly the sampler's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rollouts.trajectory import TokenTrajectory


def allowed_sets(
    positions: Sequence[tuple[int, np.ndarray]], trajectories: Sequence[TokenTrajectory]
) -> dict[str, Any]:
    """`TokenRows.allowed` and `allowed_at` of some decisions, empty without a constraint.

    Args:
        positions: index of a trajectory, and positions int64 [E] in it that are read.
    """
    if not trajectories or trajectories[0].allowed is None:
        return {}
    first: dict[int, int] = {}
    tables: list[np.ndarray] = []
    sets = []
    for index, places in positions:
        trajectory = trajectories[index]
        assert trajectory.allowed is not None and trajectory.allowed_at is not None
        # Rollouts of one call share their table.
        if id(trajectory.allowed) not in first:
            first[id(trajectory.allowed)] = sum(map(len, tables))
            tables.append(trajectory.allowed)
        own = np.full(trajectory.length, -1, dtype=np.int64)
        own[trajectory.position] = trajectory.allowed_at
        at = own[places]
        sets.append(np.where(at < 0, -1, at + first[id(trajectory.allowed)]))
    # A table is that of all rollouts of a call, and a micro-batch reads few of its sets: those alone are copied.
    used, at = np.unique(np.concatenate(sets), return_inverse=True)
    free = int(np.searchsorted(used, 0))
    if free == len(used):
        return {}
    ends = np.cumsum([len(table) for table in tables])
    bounds = np.searchsorted(used, [0, *ends])
    kept = [
        table[used[a:b] - end + len(table)]
        for table, end, a, b in zip(tables, ends, bounds[:-1], bounds[1:], strict=True)
    ]
    return {"allowed": torch.from_numpy(np.concatenate(kept)), "allowed_at": torch.from_numpy(at - free)}


def among_allowed(logits: torch.Tensor, allowed: torch.Tensor | None, at: torch.Tensor | None) -> torch.Tensor:
    """The logits [N, V], -inf for tokens outside each decision's set.

    Args:
        allowed: uint8 [sets, V / 8], packed; None keeps all tokens.
        at: int64 [N], the set of each decision; -1 keeps all tokens.
    """
    if allowed is None or at is None:
        return logits
    bits = torch.arange(7, -1, -1, device=allowed.device)
    found = ((allowed[at.clamp(min=0)][:, :, None] >> bits) & 1).flatten(1)[:, : logits.shape[1]].bool()
    # A model may have ids that the tokenizer has not.
    found = torch.nn.functional.pad(found, (0, logits.shape[1] - found.shape[1])) | (at < 0)[:, None]
    return logits.masked_fill(~found, -torch.inf)
