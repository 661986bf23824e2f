"""Rewards for a wanted level: another reward's value, measured with Gaussian noise, is to lie between two bounds.

The row's column `between` holds the bounds, [low, high] with None for an open end, so every row can want another level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rewards.load import load_reward
from rewards.score import Score, as_score
from rewards.soft import SoftReward

if TYPE_CHECKING:
    import torch

Bounds = Sequence[float | None]
# An open end: beyond any reward, and finite, so that its gradient is 0 and not 0 times infinity.
_OPEN = 1e4


class LevelLogprob(SoftReward):
    """log p(low < measurement < high | completion), the measurement normal around a differentiable reward.

    With a reward that predicts a measurement, and that measurement's noise, it is a calibrated classifier of levels.

    Args:
        reward: {name, params} of the differentiable reward.
        noise: standard deviation of the measurement around it.

    Raises:
        ValueError: the reward has no gradient, or the noise is not positive.
    """

    def __init__(self, reward: Mapping[str, Any], noise: float) -> None:
        if noise <= 0:
            raise ValueError(f"reward 'level_logprob': noise must be positive, got {noise}")
        loaded: Any = load_reward(reward["name"], reward.get("params", {}))
        if not getattr(loaded, "differentiable", False):
            raise ValueError(f"reward 'level_logprob': {reward['name']!r} has no gradient (rewards/soft.py)")
        self.reward, self.noise = loaded, noise
        self.alphabet = self.reward.alphabet
        self.__name__ = "level_logprob"

    def soft(self, prompts: Sequence[str], completions: torch.Tensor, **columns: Any) -> torch.Tensor:
        import torch

        between: Sequence[Bounds] = columns.pop("between", [None])
        if any(bounds is None for bounds in between):
            raise ValueError("reward 'level_logprob': the rows have no column between, [low, high]")
        mean = self.reward.soft(prompts, completions, **columns)
        ends = [[-_OPEN if low is None else low, _OPEN if high is None else high] for low, high in between]
        bounds = torch.tensor(ends, dtype=mean.dtype, device=mean.device)
        low, high = ((bounds - mean[:, None]) / self.noise).unbind(1)
        # log(Phi(high) - Phi(low)), on the side of the bell where neither is close to 1.
        above = low + high > 0
        low, high = torch.where(above, -high, low), torch.where(above, -low, high)
        top = torch.special.log_ndtr(high)
        return top + torch.log1p(-(torch.special.log_ndtr(low) - top).exp())


class LevelReached:
    """1 where the value of a reward lies between the row's bounds, else 0.

    Args:
        reward: {name, params} of the reward.
    """

    def __init__(self, reward: Mapping[str, Any] = {"name": "motif_activity"}) -> None:
        self.reward = load_reward(reward["name"], reward.get("params", {}))
        self.__name__ = "level_reached"

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], *, between: Sequence[Bounds], **columns: Any
    ) -> list[Score]:
        scores = [as_score(entry) for entry in self.reward(prompts, completions, **columns)]
        return [_inside(score, bounds) for score, bounds in zip(scores, between, strict=True)]


def _inside(score: Score, bounds: Bounds) -> Score:
    if score.value is None:
        return score
    low, high = bounds
    return Score(float((low is None or low < score.value) and (high is None or score.value <= high)))
