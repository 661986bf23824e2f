"""The reward contract. No torch here: a reward must load in a bare child process.

A reward is any callable of the form that TRL made common::

    def my_reward(prompts, completions, **columns) -> list[float | Score | None]

`prompts` and `completions` are lists of equal length (str, or chat message lists when the dataset is
conversational; completions are images, see `rewards.image`, where the model draws); `columns` holds every other
dataset column as a list of the same length, and what the trainer adds (`completion_ids` of text). It returns one
entry per completion:

* a float: the reward;
* `Score`: a value, per-step values for process rewards, and metrics to log;
* None: the reward does not apply to this row. Other parts of the reward still count;
* `Score(None, reason=...)`: the verdict failed. The rollout is counted and masked out of the update,
  never scored 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Union

RewardFunction = Callable[..., Sequence[Union[float, "Score", None]]]


class TransientRewardError(RuntimeError):
    """Raised by a reward for a failure worth trying again (a server that is down, a rate limit)."""


@dataclass(frozen=True)
class Score:
    """The verdict of one reward on one completion.

    Example: `Score(1.0, metrics={"cells_right": 16})`, or `Score(None, reason="timeout after 5 s")`.

    Attributes:
        value: the reward, finite; None when there is no score.
        steps: per-step values for rewards that judge the denoising steps, else None.
        reason: why there is no score (required when value is None); begin with "timeout" when time ran out.
        metrics: extra numbers to log, averaged over the completions that report them.
        applicable: False when the reward has nothing to say about this row; that is no failure.
        transient: True when the failure is worth a retry (the runner's `retries`).
    """

    value: float | None
    steps: Sequence[float] | None = None
    reason: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    applicable: bool = True
    transient: bool = False

    def __post_init__(self) -> None:
        if self.value is None and not self.reason:
            raise ValueError("Score without a value needs a reason")
        numbers = [] if self.value is None else [self.value]
        if any(not math.isfinite(number) for number in [*numbers, *([] if self.steps is None else self.steps)]):
            raise ValueError(f"Score values must be finite, got value={self.value} steps={self.steps}")

    def __float__(self) -> float:
        """The value, NaN when there is none: what TRL's GRPOTrainer makes of a score."""
        return math.nan if self.value is None else float(self.value)

    @property
    def failed(self) -> bool:
        """True when a verdict was due and none came: the completion is masked out and counted."""
        return self.value is None and self.applicable


NOT_APPLICABLE = Score(None, reason="not applicable", applicable=False)


def as_score(entry: Any) -> Score:
    """Turn one entry a reward function returned into a `Score`.

    None means "not applicable" (TRL's convention). NaN, infinity and anything that is not a number become
    a failed score with a reason rather than an exception, so one bad item cannot sink a batch.
    """
    if isinstance(entry, Score):
        return entry
    if entry is None:
        return NOT_APPLICABLE
    try:
        value = float(entry)
    except (TypeError, ValueError):
        return Score(None, reason=f"reward returned {type(entry).__name__}, not a number")
    if not math.isfinite(value):
        return Score(None, reason=f"reward returned {value}")
    return Score(value)
