"""One call of a reward function: whatever it does, an `Outcome` comes back. Used in-process and in the workers."""

from __future__ import annotations

import inspect
import threading
import time
import traceback
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rewards.score import RewardFunction, Score, TransientRewardError, as_score
from rewards.signature import missing_columns
from rewards.text import is_chat

TRANSIENT = (TransientRewardError, ConnectionError, TimeoutError)


@dataclass
class Outcome:
    """The result of one call: a score per completion, or the reason why the call as a whole has none.

    Example: `Outcome(scores=[Score(1.0)], seconds=0.002)`, `Outcome(error="KeyError: 'answer'")`.

    Attributes:
        scores: one per completion of the call; empty when the call failed.
        error: why the call failed, one line; None when it did not.
        transient: True when the failure is worth a retry.
        miscounted: True when the reward gave another number of scores than completions: no call of it can be trusted.
        seconds: wall time of the call.
        metrics: numbers the reward logged with TRL's `log_metric`.
        extra: columns the reward logged with TRL's `log_extra`.
    """

    scores: list[Score] = field(default_factory=list)
    error: str | None = None
    transient: bool = False
    miscounted: bool = False
    seconds: float = 0.0
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)


def call_reward(
    function: RewardFunction,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    columns: Mapping[str, Sequence[Any]],
    trainer_state: Any = None,
) -> Outcome:
    """Call `function` the way TRL calls rewards and turn its answer, or its exception, into an `Outcome`.

    The function receives `prompts`, `completions` and every column by keyword, plus TRL's `trainer_state`,
    `log_metric(name, value)` and `log_extra(column, values)`. A coroutine function is run to its end.
    `exit()` inside a reward is an error of that call, not the end of this process.
    """
    outcome = Outcome()

    def log_extra(column: str, values: Sequence[Any]) -> None:
        if len(values) != len(completions):
            raise ValueError(f"log_extra('{column}') got {len(values)} values for {len(completions)} completions")
        outcome.extra[column] = list(values)

    start = time.perf_counter()
    try:
        missing = missing_columns(function, {**columns, "trainer_state": 0, "log_metric": 0, "log_extra": 0})
        if missing:
            raise ValueError(f"it needs the column '{missing[0]}'; the dataset has {sorted(columns)}")
        answer = function(
            prompts=prompts,
            completions=completions,
            **columns,
            trainer_state=trainer_state,
            log_metric=lambda name, value: outcome.metrics.setdefault(name, []).append(float(value)),
            log_extra=log_extra,
        )
        if inspect.isawaitable(answer):
            answer = _run_async(answer)
        if isinstance(answer, str | Mapping) or not hasattr(answer, "__iter__"):
            raise ValueError(f"it returned a {type(answer).__name__}, not a list with a number for each completion")
        scores = [as_score(entry) for entry in answer]
        outcome.miscounted = len(scores) != len(completions)
        if outcome.miscounted:
            raise ValueError(f"the reward returned {len(scores)} entries for {len(completions)} completions")
        outcome.scores = scores
    except (Exception, SystemExit) as error:
        outcome.error = one_line(error) + _place(error) + _hint(error, completions)
        outcome.transient = isinstance(error, TRANSIENT)
    outcome.seconds = time.perf_counter() - start
    return outcome


def one_line(error: BaseException, limit: int = 300) -> str:
    """`Type: message` on one line of at most `limit` characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:limit]


def _place(error: BaseException) -> str:
    """The line of the reward's own file in which an error arose, ` (my_rewards.py, line 3)`; nothing for our files."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    if not frames or Path(frames[0].filename).is_relative_to(Path(__file__).parent):
        return ""
    own = [frame for frame in frames if frame.filename == frames[0].filename][-1]
    return f" ({Path(own.filename).name}, line {own.lineno})"


def _hint(error: BaseException, completions: Sequence[Any]) -> str:
    """The way out for a reward that took text for chats, or chats for text."""
    if "string indices must be integers" in str(error) and isinstance(completions[0], str):
        return " (it reads chats, the data is text: name it trl:FILE.py:FUNCTION or trl:MODULE:FUNCTION)"
    if isinstance(error, AttributeError | TypeError) and is_chat(completions[0]) and "list" in str(error):
        return " (the prompts are chats, so completions are too: rewards.text.text_of(completion) is the text)"
    return ""


def _run_async(answer: Awaitable[Any]) -> Any:
    import asyncio  # slow to import, and most rewards are not async

    async def finish() -> Any:
        return await answer

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(finish())
    # The caller lives in an event loop (a notebook): run in a thread of its own.
    box: dict[str, Any] = {}

    def target() -> None:
        try:
            box["value"] = asyncio.run(finish())
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    if "error" in box:
        raise box["error"]
    return box["value"]
