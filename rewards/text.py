"""Reading text out of what a dataset calls a prompt or a completion. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


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


def as_messages(text: Any, role: str) -> Any:
    """A chat of one message around a str; anything else as it is."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def is_chat(prompt: Any) -> bool:
    """True for a non-empty list of messages, each a dict with a role."""
    return (
        isinstance(prompt, list) and bool(prompt) and all(isinstance(turn, dict) and "role" in turn for turn in prompt)
    )


def answer_part(completion: str) -> str:
    """The content of the last `<answer>...</answer>`, or of one that is never closed, or all of the text."""
    end = completion.rfind("</answer>")
    start = completion.rfind("<answer>", 0, max(end, 0))
    if start < 0:  # nothing is closed
        start, end = completion.rfind("<answer>"), len(completion)
    return completion if start < 0 else completion[start + len("<answer>") : end]


def last_boxed(completion: str) -> str | None:
    r"""Content of the last complete `\boxed{...}` or `\fbox{...}` (braces matched, `\{` skipped), else None."""
    return next((completion[start:end] for start, end in reversed(boxes(completion)) if end is not None), None)


def boxes(completion: str) -> list[tuple[int, int | None]]:
    r"""Where the contents of every `\boxed{...}` start and end, in order; the end is None where it is never closed."""
    found: dict[int, int | None] = {}
    opened: list[int] = []
    for match in BOX_OR_BRACE.finditer(completion):
        if match.group() == "}":
            start = opened.pop() if opened else None
            if start in found:
                found[start] = match.start()
        elif match.group()[-1] == "{" and match.group() != r"\{":
            opened.append(match.end())
            if len(match.group()) > 1:
                found[match.end()] = None
    return sorted(found.items())
