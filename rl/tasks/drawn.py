"""Tasks whose problems are drawn at random: one search for all splits, and what it says when there are no more."""

from __future__ import annotations

import random
from typing import Any

from rl.tasks.base import Example, split_of

# Draws in a row that bring no new problem before the supply counts as used up. A split has one problem in 16, or more.
PATIENCE = 20_000


class DrawnTask:
    """Rows by rejection: problems are drawn until enough of them belong to the split that is asked for.

    A subclass draws a problem (`_propose`) and writes the row of one that is taken (`_shown`).
    """

    def train_examples(self, seed: int, step: int, count: int) -> list[Example]:
        return self._draw(f"train {seed} {step}", count, "train")

    def validation_examples(self, count: int) -> list[Example]:
        return self._draw("validation", count, "validation", distinct=True)

    def heldout_examples(self, count: int, seed: int = 0) -> list[Example]:
        return self._draw(f"test {seed}", count, "test", distinct=True)

    def _propose(self, rng: random.Random) -> tuple[str, Any] | None:
        """A problem: the content that its split depends on, and what `_shown` needs; None for a draw that is none."""
        raise NotImplementedError

    def _shown(self, problem: Any, rng: random.Random) -> Example:
        raise NotImplementedError

    def _used_up(self, found: int, count: int, split: str) -> None:
        """No more problems are found: raise ValueError unless these are enough."""
        raise NotImplementedError

    def _draw(self, key: str, count: int, split: str, distinct: bool = False) -> list[Example]:
        # A str seed is hashed with SHA-512 by `random`, the same on every machine.
        rng = random.Random(key)
        rows: list[Example] = []
        seen: set[str] = set()
        misses = 0
        while len(rows) < count:
            # A split may hold few problems or none; no draw would ever end the search.
            if misses == PATIENCE:
                self._used_up(len(rows), count, split)
                break
            misses += 1
            content, problem = self._propose(rng) or ("", None)
            if problem is not None and split_of(content) == split and not (distinct and content in seen):
                seen.add(content)
                misses = 0
                rows.append(self._shown(problem, rng))
        return rows
