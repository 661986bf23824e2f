"""Frames between the runner and its workers: requests are pickles, answers are JSON, each after an 8-byte length.

Answers are JSON so that nothing a reward process writes can run code in the trainer.
"""

from __future__ import annotations

import json
import struct
from typing import Any

from rewards.call import Outcome
from rewards.score import Score

HEADER = struct.Struct(">Q")
MAX_ANSWER_BYTES = 256 * 2**20


def frame(payload: bytes) -> bytes:
    """`payload` with its length in front."""
    return HEADER.pack(len(payload)) + payload


def take_frame(buffer: bytearray) -> bytes | None:
    """Remove and return the first complete frame of `buffer`; None when it is not complete yet.

    Raises:
        ValueError: when the announced length is absurd (a reward wrote into the pipe).
    """
    if len(buffer) < HEADER.size:
        return None
    (length,) = HEADER.unpack_from(buffer)
    if length > MAX_ANSWER_BYTES:
        raise ValueError(f"answer of {length} bytes, more than {MAX_ANSWER_BYTES}")
    if len(buffer) < HEADER.size + length:
        return None
    payload = bytes(buffer[HEADER.size : HEADER.size + length])
    del buffer[: HEADER.size + length]
    return payload


def outcome_to_json(outcome: Outcome) -> dict[str, Any]:
    """Plain data of an `Outcome`; logged values that JSON cannot hold become their `str`."""
    scores = [
        {
            **vars(score),
            "value": None if score.value is None else float(score.value),
            "steps": None if score.steps is None else [float(step) for step in score.steps],
            "metrics": {name: float(number) for name, number in score.metrics.items()},
        }
        for score in outcome.scores
    ]
    extra = json.loads(json.dumps(outcome.extra, default=str))
    return {**vars(outcome), "scores": scores, "extra": extra}


def outcome_from_json(data: dict[str, Any]) -> Outcome:
    """Inverse of `outcome_to_json`."""
    return Outcome(**{**data, "scores": [Score(**score) for score in data["scores"]]})
