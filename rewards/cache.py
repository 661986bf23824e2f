"""Scores remembered by the content of the item they judge."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from typing import Any

from rewards.jobs import Batch
from rewards.score import Score


class ScoreCache:
    """The latest `size` scores, least recently used out first. Failures are never kept; size 0 keeps nothing."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._scores: OrderedDict[str, Score] = OrderedDict()

    def split(self, reward: str, batch: Batch) -> tuple[dict[int, Score], list[int], dict[int, int]]:
        """Split a batch into known and fresh completions.

        Returns:
            known: index -> score of the completions judged before.
            fresh: indices that must be judged.
            twins: index -> earlier index of this batch with the same content, whose verdict it will share.
        """
        known: dict[int, Score] = {}
        fresh: list[int] = []
        twins: dict[int, int] = {}
        first: dict[str, int] = {}
        for index in range(len(batch)):
            key = self._key(reward, batch, index)
            if key is None:
                fresh.append(index)
            elif key in self._scores:
                self._scores.move_to_end(key)
                known[index] = self._scores[key]
            elif key in first:
                twins[index] = first[key]
            else:
                fresh.append(index)
                first[key] = index
        return known, fresh, twins

    def put(self, reward: str, batch: Batch, index: int, score: Score) -> None:
        """Keep `score`, unless it is a failure."""
        key = self._key(reward, batch, index)
        if key is None or score.failed:
            return
        self._scores[key] = score
        self._scores.move_to_end(key)
        while len(self._scores) > self.size:
            self._scores.popitem(last=False)

    def _key(self, reward: str, batch: Batch, index: int) -> str | None:
        """Hash of everything a reward sees of one completion; None when it cannot be written, or nothing is kept."""
        if not self.size:
            return None
        columns = {name: values[index] for name, values in batch.columns.items()}
        try:
            seen = [reward, batch.prompts[index], batch.completions[index], columns]
            text = json.dumps(seen, sort_keys=True, default=_content)
        except (TypeError, ValueError):
            return None
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _content(value: Any) -> list[Any]:
    """Kind, shape and digest of an array or a Pillow image, whose class need not be imported for it.

    Raises:
        TypeError: it is neither.
    """
    if not hasattr(value, "tobytes"):
        raise TypeError(f"{type(value).__name__} has no content to hash")
    kind = str(getattr(value, "dtype", None) or getattr(value, "mode", ""))
    shape = list(value.shape if hasattr(value, "shape") else value.size)
    return [kind, shape, hashlib.blake2b(value.tobytes(), digest_size=16).hexdigest()]
