"""Which fields of an answer in JSON are right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rewards.text import text_of


def json_fields(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    answer: Sequence[Any],
    log_metric: Any = None,
    partial: bool = False,
    **columns: Any,
) -> list[float]:
    """1.0 when the object has exactly the answer's fields and values, else 0.0.

    Example: `{"n": 3}` against `{"n":3,"unit":"km"}` is 0.0, and 0.5 with `partial`.

    Args:
        answer: objects, or texts in JSON.
        log_metric: gets `valid`, the share of completions that are objects in JSON.
        partial: the share of fields that are right, of all that either has, in place of all or nothing.
    """
    values, valid = [], 0
    for completion, expected in zip(completions, answer, strict=True):
        wanted = json.loads(expected) if isinstance(expected, str) else expected
        try:
            found = json.loads(text_of(completion))
        except ValueError:
            found = None
        valid += isinstance(found, dict)
        names = set(wanted) | set(found) if isinstance(found, dict) else set(wanted)
        # 1 and true are equal to Python, and not in JSON.
        right = (
            sum(
                name in wanted and name in found and json.dumps(found[name]) == json.dumps(wanted[name])
                for name in names
            )
            if isinstance(found, dict)
            else 0
        )
        share = right / len(names) if names else 1.0
        values.append(share if partial else float(share == 1.0))
    if log_metric is not None and completions:
        log_metric("valid", valid / len(completions))
    return values
