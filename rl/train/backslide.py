"""Answer backslide: right at an earlier denoising step, wrong at the end ("over-denoising"; MDPO, arXiv 2508.13148)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class Backslide:
    """Shares of rollouts, from the rewards of every step's x0 prediction, which is right at a reward of at least 1.

    Example: right, right, wrong in one rollout and wrong, wrong, right in the other: share 0.5, steps 2.0, ever 1.0.

    Attributes:
        share: rollouts that were right at an earlier step and wrong at the end.
        steps: mean number of right steps of these; 0 when there are none.
        ever: rollouts that were right at some step.
        unscored: number of rollouts that are in none of these, because a prediction of theirs has no score.
    """

    share: float
    steps: float
    ever: float
    unscored: int = 0

    def line(self) -> str:
        return (
            f"right at some step {self.ever:.3f}, right before and wrong at the end {self.share:.3f} "
            f"(on average {self.steps:.1f} right steps)" + (f", {self.unscored} not judged" if self.unscored else "")
        )


def backslide_of(step_reward: Sequence[np.ndarray]) -> Backslide:
    """From the rewards of every step's x0 prediction, float64 [T_i] each, NaN for one without a score."""
    right = [reward >= 1.0 for reward in step_reward if len(reward) and not np.isnan(reward).any()]
    unscored = len(step_reward) - len(right)
    if not right:
        return Backslide(float("nan"), float("nan"), float("nan"), unscored)
    slid = [int(steps.sum()) for steps in right if steps.any() and not steps[-1]]
    share, ever = len(slid) / len(right), sum(bool(steps.any()) for steps in right) / len(right)
    return Backslide(share, float(np.mean(slid)) if slid else 0.0, ever, unscored)
