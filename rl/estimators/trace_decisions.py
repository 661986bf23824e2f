"""Which decisions of a trace are trained, and what each counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from rl.estimators.rows import TokenRows
from rollouts.trajectory import TokenTrajectory


def num_answered(trajectory: TokenTrajectory, steps: Any = None) -> int:
    """Tokens revealed up to the answer's end token."""
    inside = trajectory.position < trajectory.prompt_length + trajectory.stop_length
    return int((trajectory.is_reveal & inside).sum())


def answer_only(rows: TokenRows, trajectories: Sequence[TokenTrajectory]) -> TokenRows:
    """Without the tokens behind an answer's end token. They stay in the canvas where they were seen."""
    end = torch.tensor([t.prompt_length + t.stop_length for t in trajectories])
    kept = rows.position_ids[rows.row, rows.column] < end[rows.trajectory]
    flat = ("row", "column", "target", "trajectory", "step", "sampler_logprob", "weight_factor")
    return replace(rows, **{n: getattr(rows, n)[kept] for n in flat if getattr(rows, n) is not None})


def with_equal_steps(rows: TokenRows) -> TokenRows:
    """With shares by which every step of a trajectory counts the same: tokens / (steps x tokens of the step)."""
    place = torch.stack([rows.trajectory, rows.step])
    pairs, pair, size = torch.unique(place, dim=1, return_inverse=True, return_counts=True)
    steps, tokens = torch.bincount(pairs[0]), torch.bincount(rows.trajectory)
    share = tokens[rows.trajectory] / (steps[rows.trajectory] * size[pair]).double()
    return replace(rows, weight_factor=share)
