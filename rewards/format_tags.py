"""Does the completion have the required form? Says nothing about whether it is right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rewards.text import text_of

THINK_ANSWER = r"<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>"


class FormatReward:
    """1.0 when the whole completion (outer white space aside) matches a regular expression, else 0.0.

    Args:
        pattern: the expression, with `.` matching line ends; by default one `<think>...</think>` block followed by
            one `<answer>...</answer>` block and nothing else.

    Raises:
        ValueError: when `pattern` is no regular expression.
    """

    def __init__(self, pattern: str = THINK_ANSWER) -> None:
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"reward 'format': pattern {pattern!r} is no regular expression: {error}") from error

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return [float(self.pattern.fullmatch(text_of(text).strip()) is not None) for text in completions]
