"""Rewards of earlier RL steps by prompt: what a new reward of the prompt is compared with."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch


class PromptHistory:
    """The last `steps` RL steps before the current one, per prompt; a recipe's memory."""

    def __init__(self, steps: int, min_count: int = 2, correction: int = 1, eps: float = 1e-8):
        """
        Args:
            min_count: rewards a prompt needs for statistics of its own; with fewer, those of all prompts of the
                current step stand in, their remembered rewards included.
            correction: 1 for the sample standard deviation (n - 1; B²-DiffuRL), 0 for the population's (n; DDPO).
            eps: added to the standard deviation.
        """
        self.steps, self.min_count, self.correction, self.eps = steps, min_count, correction, eps
        self._rewards: dict[str, list[list[float]]] = {}

    def z_scores(self, reward: torch.Tensor, prompts: Sequence[Hashable]) -> torch.Tensor:
        """[M] rewards of this step, each minus the mean of its prompt, over its standard deviation plus eps.

        The statistics cover this step and the remembered ones, and this step is remembered. NaN stays NaN.
        """
        members: dict[str, list[int]] = {}
        for index in (~reward.isnan()).nonzero().flatten().tolist():
            members.setdefault(str(prompts[index]), []).append(index)
        now = {name: reward[own].tolist() for name, own in members.items()}
        pools = {
            name: torch.tensor([v for part in (*self._rewards.get(name, []), values) for v in part]).double()
            for name, values in now.items()
        }
        result = torch.full_like(reward, torch.nan)
        for name, own in members.items():
            pool = pools[name] if len(pools[name]) >= self.min_count else torch.cat(list(pools.values()))
            spread = float(pool.std(correction=self.correction)) if len(pool) > 1 else 0.0
            # Equal rewards have no better and no worse; dividing rounding errors by eps would invent them.
            result[own] = 0.0 if spread < self.eps else (reward[own] - float(pool.mean())) / (spread + self.eps)
            self._rewards[name] = [*self._rewards.get(name, []), now[name]][-self.steps :] if self.steps else []
        return result

    def state(self) -> dict[str, Any]:
        return self._rewards

    def restore(self, state: dict[str, Any]) -> None:
        self._rewards = {name: [list(part) for part in parts] for name, parts in state.items()}


class PromptNumbers:
    """One number for every prompt, moved a part of the way to its estimate whenever the prompt is met; a memory."""

    def __init__(self) -> None:
        self._numbers: dict[str, float] = {}

    def towards(self, prompts: Sequence[Hashable], estimate: torch.Tensor, rate: float) -> torch.Tensor:
        """[M]: each prompt's number before it moves; that of a new prompt is its estimate.

        Args:
            estimate: [M], of which the mean over a prompt's rollouts counts; NaN takes no part.
            rate: share of the way.
        """
        names = [str(prompt) for prompt in prompts]
        result = torch.full_like(estimate, torch.nan)
        for name in dict.fromkeys(names):
            own = torch.tensor([other == name for other in names]) & ~estimate.isnan()
            if own.any():
                mean = float(estimate[own].mean())
                now = self._numbers.get(name, mean)
                result[own] = now
                self._numbers[name] = now + rate * (mean - now)
        return result

    def state(self) -> dict[str, Any]:
        return self._numbers

    def restore(self, state: dict[str, Any]) -> None:
        self._numbers = dict(state)
