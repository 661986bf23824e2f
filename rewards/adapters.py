"""Rewards written for other frameworks, unchanged; and ours inside TRL.

Ours need no adapter in TRL's GRPOTrainer: a `Score` converts to the float it expects. `as_trl_reward` adds that the
metrics of scores are logged, and it turns a failure into TRL's None.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.call import one_line
from rewards.score import RewardFunction, Score, as_score
from rewards.text import text_of


class TrlReward:
    """A function of `trl.rewards`: they read chat messages only, so plain text is wrapped into one message."""

    def __init__(self, function: RewardFunction) -> None:
        self.function = function
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Any:
        return self.function(
            prompts=[_messages(prompt, "user") for prompt in prompts],
            completions=[_messages(completion, "assistant") for completion in completions],
            **columns,
        )


class VerlReward:
    """A verl `compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs)`, sync or async.

    Columns, as in verl's data files: `data_source` and `extra_info` (optional), and the reference in `ground_truth`
    or in `reward_model["ground_truth"]`. A dict answer gives its `score`; its other numbers become metrics. An
    exception costs its own completion only.

    Args:
        function: the `compute_score`.
        params: verl's `reward_kwargs`.
    """

    def __init__(self, function: Callable[..., Any], params: Mapping[str, Any]) -> None:
        self.compute_score = function
        self.params = dict(params)
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Any:
        count = len(completions)
        if "ground_truth" not in columns and "reward_model" not in columns:
            raise ValueError(f"verl reward {self.__name__} needs the column `ground_truth` (or `reward_model`)")
        truths = columns.get("ground_truth") or [row["ground_truth"] for row in columns["reward_model"]]
        sources = columns.get("data_source") or [""] * count
        extras = columns.get("extra_info") or [None] * count
        calls = [
            {
                "data_source": sources[item],
                "solution_str": text_of(completions[item]),
                "ground_truth": truths[item],
                "extra_info": extras[item],
                **self.params,
            }
            for item in range(count)
        ]
        if inspect.iscoroutinefunction(self.compute_score):
            return self._score_all(calls)
        return [self._score_one(call) for call in calls]

    def _score_one(self, call: Mapping[str, Any]) -> Score:
        try:
            return _verl_score(self.compute_score(**call))
        except Exception as error:
            return Score(None, reason=one_line(error))

    async def _score_all(self, calls: Sequence[Mapping[str, Any]]) -> list[Score]:
        import asyncio  # slow to import, and most rewards are not async

        answers = await asyncio.gather(*(self.compute_score(**call) for call in calls), return_exceptions=True)
        return [
            Score(None, reason=one_line(answer)) if isinstance(answer, BaseException) else _verl_score(answer)
            for answer in answers
        ]


class AsTrlReward:
    """See `as_trl_reward`."""

    def __init__(self, function: RewardFunction) -> None:
        self.function = function
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        return self._plain(self.function(prompts=prompts, completions=completions, **columns), columns)

    def _plain(self, answer: Sequence[Any], columns: Mapping[str, Any]) -> list[float | None]:
        scores = [as_score(entry) for entry in answer]
        log_metric = columns.get("log_metric")
        if log_metric is not None:
            for name in sorted({name for score in scores for name in score.metrics}):
                values = [score.metrics[name] for score in scores if name in score.metrics]
                log_metric(f"{self.__name__}/{name}", math.fsum(values) / len(values))
            log_metric(f"{self.__name__}/failures", float(sum(score.failed for score in scores)))
        return [score.value for score in scores]


class AsAsyncTrlReward(AsTrlReward):
    """`AsTrlReward` for an async reward; TRL looks for `async` on `__call__`."""

    async def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:  # type: ignore[override]
        return self._plain(await self.function(prompts=prompts, completions=completions, **columns), columns)  # type: ignore[misc]


def as_trl_reward(function: RewardFunction) -> Callable[..., Any]:
    """One of our rewards as TRL's GRPOTrainer wants it: floats, None for no score, metrics through `log_metric`.

    The result keeps the name of the reward, can be pickled when the reward can, and is async when the reward is.
    """
    is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)
    return (AsAsyncTrlReward if is_async else AsTrlReward)(function)


def _messages(text: Any, role: str) -> Any:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _verl_score(answer: Any) -> Score:
    if not isinstance(answer, Mapping):
        return as_score(answer)
    if "score" not in answer:
        return Score(None, reason=f"compute_score returned a dict without 'score': {sorted(answer)}"[:300])
    score = as_score(answer["score"])
    numbers = {name: float(value) for name, value in answer.items() if isinstance(value, int | float)}
    numbers.pop("score", None)
    return Score(score.value, reason=score.reason, metrics=numbers, applicable=score.applicable)
