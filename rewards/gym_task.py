"""Any reasoning-gym task, judged by its own verifier (`pip install denoise-rl[gym]`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rewards.call import one_line
from rewards.score import Score
from rewards.signature import nearest
from rewards.text import answer_part, text_of


class ReasoningGymReward:
    """Score in [0, 1] of the task's `score_answer`; named "reasoning_gym:TASK", for example "reasoning_gym:countdown".

    Many verifiers pay partial credit, and some pay for merely answering (countdown: 0.01 for anything, 0.05 for an
    expression of the right form); `threshold` makes a 0/1 reward of them.

    Columns: `metadata` (the item's dict, or that dict as JSON text), `answer` and `question` as reasoning-gym gives
    them. The completion's answer is what its last `<answer>` tag holds, else all of it.

    Args:
        task: name of a reasoning-gym dataset.
        threshold: when given, the reward is 1.0 from this score on and 0.0 below.

    Raises:
        ValueError: for an unknown task (naming the nearest), or when reasoning-gym is not installed.
    """

    def __init__(self, task: str, threshold: float | None = None) -> None:
        try:
            import reasoning_gym
            from reasoning_gym.factory import DATASETS
        except ModuleNotFoundError as error:
            raise ValueError("reward 'reasoning_gym' needs the package: pip install 'denoise-rl[gym]'") from error
        if task not in DATASETS:
            raise ValueError(
                f"reward 'reasoning_gym': unknown task '{task}'; did you mean '{nearest(task, DATASETS)}'?"
            )
        self.task = task
        self.threshold = threshold
        self.score_answer = reasoning_gym.get_score_answer_fn(task)
        self.__name__ = task

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], metadata: Sequence[Any], **columns: Any
    ) -> list[Score]:
        count = len(completions)
        answers = columns.get("answer") or [None] * count
        questions = columns.get("question") or [text_of(prompt) for prompt in prompts]
        return [
            self._score_one(answer_part(text_of(completions[i])).strip(), questions[i], answers[i], metadata[i])
            for i in range(count)
        ]

    def _score_one(self, text: str, question: str, answer: Any, metadata: Any) -> Score:
        details = json.loads(metadata) if isinstance(metadata, str) else metadata
        if self.task in ("arc_agi", "rearc"):  # their boards are compared as tuples, which JSON makes lists
            details = {**details, "output": tuple(map(tuple, details["output"]))}
        try:
            score = float(self.score_answer(text, {"question": question, "answer": answer, "metadata": details}))
        except Exception as error:  # verifiers trip over odd answers; that costs this one its score
            return Score(None, reason=f"verifier of {self.task}: {one_line(error)}")
        value = score if self.threshold is None else float(score >= self.threshold)
        return Score(value, metrics={"raw_score": score})
