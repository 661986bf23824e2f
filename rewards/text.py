"""Reading text out of what a dataset calls a prompt or a completion. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def text_of(message: Any) -> str:
    """Plain text of a prompt or completion: a str as it is, the last message's content of a chat.

    Content given as parts (`[{"type": "text", "text": ...}, ...]`) is joined; parts that are not text are
    skipped.

    Raises:
        TypeError: for anything that is neither a str nor a non-empty list of chat messages.
    """
    if isinstance(message, str):
        return message
    if isinstance(message, Sequence) and message and isinstance(message[-1], dict):
        content = message[-1].get("content")
        if isinstance(content, list):
            return "".join(part.get("text", "") for part in content if isinstance(part, dict))
        return content or ""
    raise TypeError(f"expected text or a list of chat messages, got {type(message).__name__}")


def answer_part(completion: str) -> str:
    """The content of the last `<answer>...</answer>`, or the whole text when there is no such tag."""
    tagged = ANSWER_TAG.findall(completion)
    return tagged[-1] if tagged else completion


def last_boxed(completion: str) -> str | None:
    r"""Content of the last complete `\boxed{...}` or `\fbox{...}` (braces matched, `\{` skipped), else None."""
    found = None
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", completion):
        depth, position = 1, match.end()
        while position < len(completion) and depth:
            if completion[position] == "\\":
                position += 2
                continue
            depth += {"{": 1, "}": -1}.get(completion[position], 0)
            position += 1
        if not depth:
            found = completion[match.end() : position - 1]
    return found
