"""Rewards written for other frameworks (TRL, verl, verifiers), unchanged; and ours inside TRL.

Ours need no adapter in TRL's GRPOTrainer: a `Score` converts to the float it expects. `as_trl_reward` adds that the
metrics of scores are logged, and it turns a failure into TRL's None.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from rewards.call import one_line
from rewards.score import RewardFunction, Score, as_score
from rewards.signature import accepted, parameters, reward_name
from rewards.text import as_messages, text_of

GROUP_ARGUMENTS = {"states", "prompts", "completions", "answers", "tasks", "infos"}


class TrlReward:
    """A function that reads chats only, as those of `trl.rewards`: plain text is wrapped into one message."""

    def __init__(self, function: RewardFunction) -> None:
        self.function = function
        self.__name__ = reward_name(function)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Any:
        return self.function(
            prompts=[as_messages(prompt, "user") for prompt in prompts],
            completions=[as_messages(completion, "assistant") for completion in completions],
            **columns,
        )


class OneByOne:
    """A function of another framework that judges one completion a call, sync or async.

    A call gets those of its arguments that the function names, or all when it takes `**kwargs`. An exception costs its
    own completion only.

    Args:
        function: the function.
        params: its parameters from the config.
    """

    def __init__(self, function: Callable[..., Any], params: Mapping[str, Any]) -> None:
        self.judge = function
        self.params = dict(params)
        self.__name__ = reward_name(function)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Any:
        answers: list[Any] = []
        for call in self.calls(prompts, completions, columns):
            try:
                answers.append(self.answer(call))
            except Exception as error:
                answers.append(error)
        if any(map(inspect.isawaitable, answers)):
            return self._finish(answers)
        return [self.score(answer) for answer in answers]

    async def _finish(self, answers: Sequence[Any]) -> list[Score]:
        import asyncio  # slow to import, and most rewards are not async

        waiting = [answer for answer in answers if inspect.isawaitable(answer)]
        found = iter(await asyncio.gather(*waiting, return_exceptions=True))
        return [self.score(next(found) if inspect.isawaitable(answer) else answer) for answer in answers]

    def calls(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Per completion, the arguments that a call may take."""
        raise NotImplementedError

    def answer(self, call: Mapping[str, Any]) -> Any:
        """The function's answer, perhaps to be awaited."""
        return self.judge(**accepted(self.judge, call))

    def score(self, answer: Any) -> Score:
        """The answer, or the exception, as a score. A dict gives its `score`; its other numbers become metrics."""
        if isinstance(answer, BaseException):
            return Score(None, reason=one_line(answer))
        if not isinstance(answer, Mapping):
            return as_score(answer)
        value = answer.get("score", answer.get("reward"))
        if value is None:
            return Score(None, reason=f"{self.__name__} returned a dict without 'score': {sorted(answer)}"[:300])
        score = as_score(value)
        numbers = {name: float(number) for name, number in answer.items() if isinstance(number, int | float)}
        numbers = {name: number for name, number in numbers.items() if name not in ("score", "reward")}
        return Score(score.value, reason=score.reason, metrics=numbers, applicable=score.applicable)


class VerlReward(OneByOne):
    """A verl `compute_score`: any of `data_source, solution_str, ground_truth, extra_info` and `reward_kwargs`.

    The batch form (`data_sources, solution_strs, ground_truths, extra_infos`) is called once for a batch. Columns, as
    in verl's data files: `data_source` and `extra_info` (optional), and the reference in `ground_truth` or in
    `reward_model["ground_truth"]`. As in verl, `extra_info` is a dict even where the row has none, and holds
    `num_turns` and `rollout_reward_scores` too.
    """

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Any:
        if not any(parameter.name == "solution_strs" for parameter in parameters(self.judge)):
            return super().__call__(prompts, completions, **columns)
        calls = self.calls(prompts, completions, columns)
        listed = {f"{name}s": [call[name] for call in calls] for name in calls[0] if name not in self.params}
        answers = self.judge(**accepted(self.judge, {**listed, **self.params}))
        return self._batch(answers) if inspect.isawaitable(answers) else [self.score(answer) for answer in answers]

    async def _batch(self, answers: Awaitable[Any]) -> list[Score]:
        return [self.score(answer) for answer in await answers]

    def calls(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        count = len(completions)
        if "ground_truth" not in columns and "reward_model" not in columns:
            raise ValueError(f"verl reward {self.__name__} needs the column `ground_truth` (or `reward_model`)")
        truths = columns.get("ground_truth") or [_plain(row)["ground_truth"] for row in columns["reward_model"]]
        sources = columns.get("data_source") or [""] * count
        extras = columns.get("extra_info") or [None] * count
        added: dict[str, Any] = {"num_turns": None, "rollout_reward_scores": {}}
        return [
            {
                "data_source": sources[item],
                "solution_str": text_of(completions[item]),
                "ground_truth": truths[item],
                "extra_info": {**added, **(_plain(extras[item]) or {})},
                **self.params,
            }
            for item in range(count)
        ]


class VerifiersReward(OneByOne):
    """A reward function, a rubric or an environment of `verifiers` (prime-rl's environments), judged offline.

    A function gets, by name, those it asks for of `prompt` and `completion` (chat messages), `answer`, `info`, `task`,
    `state`, `parser`, the rubric's objects and the row's other columns. A rubric's value is the weighted sum of its
    functions; each is a metric. Unlike there, an exception is a failed score and not 0. Functions that compare a group
    are refused.

    Args:
        found: the function, rubric, rubric group or environment.
        params: further arguments of the functions, such as a `parser`.

    Raises:
        ValueError: it is neither, or one of its functions compares a group.
    """

    def __init__(self, found: Any, params: Mapping[str, Any]) -> None:
        rubric = getattr(found, "rubric", found)
        parts = getattr(rubric, "rubrics", None) or [rubric]
        self.parts: list[tuple[Callable[..., Any], float, Mapping[str, Any]]] = []
        for part in parts:
            functions = getattr(part, "funcs", None) or ([part] if callable(part) else [])
            weights = getattr(part, "weights", None) or [1.0] * len(functions)
            objects = {"parser": getattr(part, "parser", None), **getattr(part, "class_objects", {})}
            self.parts += [(function, weight, objects) for function, weight in zip(functions, weights, strict=True)]
        super().__init__(found, params)
        if not self.parts:
            raise ValueError(f"reward 'verifiers': {self.__name__} is no function and has no reward functions")
        for function, _, _ in self.parts:
            asked = sorted({parameter.name for parameter in parameters(function)} & GROUP_ARGUMENTS)
            if asked:
                raise ValueError(
                    f"reward 'verifiers': {reward_name(function)} asks for `{asked[0]}`, so it compares a group; "
                    "only functions of one completion can be used"
                )

    def calls(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        calls = []
        for item, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            row = {name: values[item] for name, values in columns.items() if isinstance(values, Sequence)}
            call = {"answer": "", "task": None, **row, "info": _plain(row.get("info")) or {}}
            call |= {"prompt": as_messages(prompt, "user"), "completion": as_messages(completion, "assistant")}
            calls.append({**call, "state": {**call, "input": row, "trajectory": [], "is_completed": True}})
        return calls

    def answer(self, call: Mapping[str, Any]) -> Any:
        values = [
            function(**accepted(function, {**call, **objects, **self.params})) for function, _, objects in self.parts
        ]
        return self._sum(values) if any(map(inspect.isawaitable, values)) else self._weighted(values)

    async def _sum(self, values: Sequence[Any]) -> dict[str, float]:
        return self._weighted([await value if inspect.isawaitable(value) else value for value in values])

    def _weighted(self, values: Sequence[Any]) -> dict[str, float]:
        numbers = [float(value) for value in values]
        total = math.fsum(weight * number for (_, weight, _), number in zip(self.parts, numbers, strict=True))
        names = [reward_name(function) for function, _, _ in self.parts]
        return {**dict(zip(names, numbers, strict=True)), "score": total}


class AsTrlReward:
    """See `as_trl_reward`."""

    def __init__(self, function: RewardFunction) -> None:
        self.function = function
        self.__name__ = reward_name(function)

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


def _plain(cell: Any) -> Any:
    """A dict that a CSV or JSON file holds as text."""
    return json.loads(cell) if isinstance(cell, str) and cell.startswith("{") else cell
