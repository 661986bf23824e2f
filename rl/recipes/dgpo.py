"""DGPO: GDPO's eager gradient on directed acyclic graphs, with rewards compared with running statistics.

Liuliakov et al. 2026, "DGPO" (arXiv 2602.19261), read in its authors' code: the eager gradient of `rl/recipes/gdpo.py`
on graphs with `task.directed` (topological order, positional encoding). Of equal graphs of a step one is trained.

Departs as GDPO does, and no layers are frozen (three quarters of them there).
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rl.batch import Tensor
from rl.estimators.base import Verdicts
from rl.recipes.gdpo import GDPO


class RunningStatistics:
    """Mean and standard deviation of rewards, moved a part of the way to those of every step; a memory."""

    def __init__(self) -> None:
        self.numbers: list[float] = []

    def moved(self, mean: float, std: float, rate: float) -> list[float]:
        """[mean, standard deviation] after a step; the first step's are its own."""
        before = self.numbers or [mean, std]
        self.numbers = [(1 - rate) * old + rate * new for old, new in zip(before, (mean, std), strict=True)]
        return self.numbers

    def state(self) -> dict[str, Any]:
        return {"numbers": self.numbers}

    def restore(self, state: dict[str, Any]) -> None:
        self.numbers = list(state["numbers"])


class DGPO(GDPO):
    rate: float = Field(0.1, gt=0, le=1, description="Share of the way that running statistics move to a step's.")

    @property
    def needs_group(self) -> bool:
        return False

    def memory(self) -> RunningStatistics:
        return RunningStatistics()

    def summary(self, trajectory: Any) -> bytes:
        return bytes(trajectory.states[-1].tobytes())

    def advantage(self, verdicts: Verdicts) -> Tensor:
        """[M], of the first of equal graphs; NaN for the others, and where there is no reward."""
        import torch

        first: dict[bytes, int] = {}
        for index in (~verdicts.reward.isnan()).nonzero().flatten().tolist():
            first.setdefault(verdicts.summaries[index], index)
        kept = list(first.values())
        advantage, reward = torch.full_like(verdicts.reward, torch.nan), verdicts.reward[kept]
        if kept:
            mean, std = verdicts.memory.moved(float(reward.mean()), float(reward.std(correction=0)), self.rate)
            spread = float(reward.max() - reward.min())
            # Equal rewards have no better and no worse.
            advantage[kept] = (reward - mean) / max(std, 1e-8) if spread > 1e-8 else 0.0
        return advantage.clamp(-self.max_advantage, self.max_advantage)
