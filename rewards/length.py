"""Rewards about how much was generated and how fast: length, overlong, tokens per forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards.score import Score


def length(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    max_length: int,
    **columns: Any,
) -> list[float]:
    """Cost of length: minus the share of `max_length` tokens used, from 0 down to -1.

    Args:
        completion_ids: [B] token ids of the answers, up to and including the end token.
        max_length: tokens at which the cost is -1.
    """
    _positive("length", max_length=max_length)
    return [-min(1.0, len(ids) / max_length) for ids in completion_ids]


def overlong(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    max_length: int,
    cache_length: int,
    **columns: Any,
) -> list[float]:
    """Soft punishment of overlong answers, equation 13 of DAPO (arXiv:2503.14476).

    0 up to `max_length - cache_length` tokens, then falling linearly to -1 at `max_length`, -1 beyond.

    Args:
        max_length: L_max.
        cache_length: L_cache, the length of the slope.
    """
    _positive("overlong", max_length=max_length, cache_length=cache_length)
    free = max_length - cache_length
    return [-min(1.0, max(0.0, (len(ids) - free) / cache_length)) for ids in completion_ids]


def tokens_per_forward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    completion_ids: Sequence[Sequence[int]],
    num_forwards: Sequence[int],
    full_speed: float,
    **columns: Any,
) -> list[Score]:
    """Speed of decoding: answer tokens per model forward, as a share of `full_speed`, at most 1.

    Pay it only beside a reward for being right: alone it is highest for an empty thought decoded in one step.

    Args:
        num_forwards: [B] forwards each rollout took part in: its denoising steps, and what its decoder adds to them.
        full_speed: tokens per forward that earn the full reward.

    Metric: `tokens_per_forward`.
    """
    _positive("tokens_per_forward", full_speed=full_speed)
    scores = []
    for ids, forwards in zip(completion_ids, num_forwards, strict=True):
        if forwards < 1:
            scores.append(Score(None, reason=f"num_forwards is {forwards}, it must be at least 1"))
            continue
        speed = len(ids) / forwards
        scores.append(Score(min(1.0, speed / full_speed), metrics={"tokens_per_forward": speed}))
    return scores


def _positive(reward: str, **params: float) -> None:
    for name, value in params.items():
        if value <= 0:
            raise ValueError(f"reward '{reward}': {name} must be positive, got {value}")
