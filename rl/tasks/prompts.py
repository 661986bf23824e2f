"""Prompts for image models: a built-in list of compositions, or the lines of a file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from rl.files import read_text
from rl.tasks.base import Example
from rl.tasks.records import read_records

# The 45 animals of DDPO (Black et al. 2023, arXiv 2305.13301) in the order of B²-DiffuRL (Hu et al. 2025, arXiv
# 2503.11240): the first 15 are trained washing dishes, the next riding a bike, the last playing chess.
ANIMALS = (
    *("cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow", "goat"),
    *("lion", "tiger", "bear", "raccoon", "fox", "wolf", "lizard", "beetle", "ant", "butterfly", "fish", "shark"),
    *("whale", "dolphin", "squirrel", "mouse", "rat", "snake", "turtle", "frog", "chicken", "duck", "goose", "bee"),
    *("pig", "turkey", "fly", "llama", "camel", "bat", "gorilla", "hedgehog", "kangaroo"),
)
ACTIVITIES = ("washing dishes", "riding a bike", "playing chess")
BUILT_IN = "animal_activities"


class PromptsTask:
    """An image is right when a CLIP model tells its prompt from all others of the list (`clip_match`)."""

    modality = "images"
    grid = None
    alphabet = None

    def __init__(
        self,
        train: str = BUILT_IN,
        heldout: str | None = None,
        reward: str | None = "clip_match",
    ):
        """
        Args:
            train: animal_activities (45 animals, each with one of three activities), or a file: a prompt per line, or
                records with a column `prompt` (.jsonl, .json, .csv, .parquet).
            heldout: a file of prompts that are not trained; None takes the 90 other combinations of the built-in list,
                and the training prompts themselves beside a file.
            reward: the verifier; `reward.functions` may give it parameters, with weight 0 where it is not trained on.
                None lets the rewards trained on judge.
        """
        self.reward = reward
        self._train = _rows(train, trained=True)
        self._heldout = _rows(heldout or train, trained=heldout is not None)
        self.prompts = [row["prompt"] for row in self._train]

    def train_examples(self, seed: int, step: int, count: int) -> list[Example]:
        """Drawn with replacement."""
        return _with_others(random.Random(f"prompts {seed} {step}").choices(self._train, k=count), self._train)

    def validation_examples(self, count: int) -> list[Example]:
        """Training prompts: held-out ones are for the end."""
        return _with_others(_cycle(self._train, count), self._train)

    def heldout_examples(self, count: int, seed: int = 0) -> list[Example]:
        """Every prompt equally often; a prompt that comes again starts from another noise."""
        return _with_others(_cycle(self._heldout, count), self._heldout)

    def file_examples(self, path: str) -> list[Example]:
        rows = _rows(path, trained=True)
        return _with_others(rows, rows)


def _rows(source: str, trained: bool) -> list[Example]:
    if source == BUILT_IN:
        rows: list[Example] = [{"prompt": text} for text in _combinations(trained)]
    elif Path(source).suffix == ".txt":
        if not Path(source).is_file():
            raise ValueError(
                f"task.params: there is no file of prompts {source!r}, and the built-in list is {BUILT_IN}"
            )
        rows = [
            {"prompt": line.strip()}
            for line in read_text(source, "task.params: file of prompts").splitlines()
            if line.strip()
        ]
    else:
        rows = [dict(record) for record in read_records(source)]
    wrong = next((index for index, row in enumerate(rows, 1) if not isinstance(row.get("prompt"), str)), None)
    if wrong is not None or not rows:
        raise ValueError(f"task.params: {source} must hold prompts, row {wrong or 1} has none")
    return rows


def _with_others(rows: Sequence[Example], source: Sequence[Example]) -> list[Example]:
    """Rows with the other prompts of their list, which only those handed out have, to save memory."""
    texts = sorted({row["prompt"] for row in source})
    return [{"others": [text for text in texts if text != row["prompt"]], **row} for row in rows]


def _combinations(trained: bool) -> list[str]:
    return [
        f"a {animal} {activity}"
        for place, animal in enumerate(ANIMALS)
        for index, activity in enumerate(ACTIVITIES)
        if (index == place // 15) == trained
    ]


def _cycle(rows: Sequence[Example], count: int) -> list[Example]:
    return [rows[index % len(rows)] for index in range(count)]
