"""Files of preferences: two answers to a prompt, of which `chosen` is the better one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl.tasks.base import Example
from rl.tasks.chat import checked_chat
from rl.tasks.records import read_records

SIDES = ("chosen", "rejected")


def read_pairs(path: str) -> list[Example]:
    """Rows of a file of preferences as examples with `prompt`, `chosen` and `rejected`.

    The sides are text, or messages. Without a column `prompt` they are whole conversations, whose last turns are the
    answers (the two layouts of TRL). Further columns `score_chosen` and `score_rejected` are held against the order.

    Raises:
        ValueError: one line with the row: a side is missing or empty, both are equal, the conversations differ before
            their last turn, or the scores are a tie or say the opposite.
    """
    pairs = []
    for number, record in enumerate(read_records(path), start=1):
        where = f"{path}: row {number}"
        sides = [_side(record, name, where) for name in SIDES]
        prompt = record.get("prompt")
        if prompt is None:
            if not all(isinstance(side, list) and len(side) > 1 for side in sides):
                raise ValueError(f"{where} has no prompt: fill it in, or give both sides as whole conversations")
            if sides[0][:-1] != sides[1][:-1]:
                raise ValueError(f"{where}: chosen and rejected differ before their last turn, so their prompts do")
            prompt, sides = sides[0][:-1], [side[-1:] for side in sides]
        elif not isinstance(prompt, str):
            prompt = checked_chat(prompt, f"{where}: column 'prompt'")
        if sides[0] == sides[1]:
            raise ValueError(f"{where}: chosen and rejected are equal, which prefers nothing: leave the row out")
        scores = [record.get(f"score_{name}") for name in SIDES]
        if None not in scores and not float(scores[0]) > float(scores[1]):  # type: ignore[arg-type]
            what = "a tie" if float(scores[0]) == float(scores[1]) else "the wrong way round"  # type: ignore[arg-type]
            raise ValueError(f"{where}: score_chosen {scores[0]} and score_rejected {scores[1]} are {what}")
        pairs.append({"prompt": prompt, **dict(zip(SIDES, sides, strict=True))})
    return pairs


def _side(record: Mapping[str, Any], name: str, where: str) -> Any:
    value = record.get(name)
    if value is None or value in ("", []):
        raise ValueError(f"{where} has no {name!r}: fill it in, or leave the row out")
    return value if isinstance(value, str) else checked_chat(value, f"{where}: column {name!r}")
