"""Fields of a short sentence as JSON: a first task for a constraint by a schema."""

from __future__ import annotations

import json
import random

from rl.tasks.base import Example
from rl.tasks.drawn import DrawnTask
from rl.tasks.records import read_records

_NAMES = ("ada", "ben", "eva", "gus", "ida", "kim", "leo", "max", "nia", "tom")
_UNITS = ("km", "mi")
# Of one length, so that a small model with learned positions picks them up in minutes.
_FORMS = ("{w} ran {n} {u}.", "{u} {n} for {w}.", "{w}: {n} {u} run")


class ExtractTask(DrawnTask):
    """Prompt `ada ran 12 km.>`, answer `{"w":"ada","n":12,"u":"km"}`, judged by `json_fields`."""

    reward = "json_fields"
    grid = None
    alphabet = 'abcdefghijklmnopqrstuvwxyz0123456789 .:,>{}"'

    def file_examples(self, path: str) -> list[Example]:
        """Rows of any file with the columns `prompt` and `answer`, a text in JSON."""
        records = read_records(path)
        for column in ("prompt", "answer"):
            if column not in records[0]:
                raise ValueError(f"{path} has no column {column!r}; it has {', '.join(records[0])}")
        return [dict(record) for record in records]

    def _propose(self, rng: random.Random) -> tuple[str, Example]:
        fields = {"w": rng.choice(_NAMES), "n": rng.randint(10, 99), "u": rng.choice(_UNITS)}
        prompt = rng.choice(_FORMS).format(**fields) + ">"
        return prompt, {"prompt": prompt, "answer": json.dumps(fields, separators=(",", ":"))}

    def _shown(self, problem: Example, rng: random.Random) -> Example:
        return problem

    def _used_up(self, found: int, count: int, split: str) -> None:
        raise ValueError(f"the task extract has only {found} {split} sentences where {count} are asked for")
