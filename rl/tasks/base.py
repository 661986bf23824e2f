"""A task: examples to train on, examples never trained on, and the reward that judges them.

An example is a dict with `prompt` (text), optionally `answer` (text to imitate in supervised training), and
any other columns, which the reward receives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

Example = dict[str, Any]

# Arguments of every reward call beside `completions` and the columns (`rewards.call.call_reward`).
CALL_ARGUMENTS = ("prompts", "trainer_state", "log_metric", "log_extra")


class Task(Protocol):
    """A source of prompts.

    Attributes:
        reward: name of the verifier: it judges evaluations, and is trained on when the config names no reward. With
            None the rewards trained on judge (`rl.sections.RewardConfig.judges`).
        grid: (rows, columns) of the response for the denoising viewer, None for running text.
        alphabet: characters of the built-in character tokenizer, None when the task needs a real one. With a further
            attribute `ends` False, that tokenizer has no end token: every response has the full length.

    A task may also have `templates` (`rl.tasks.templates`), the prompts that evaluation can ask it with, and
    `measure(examples, completions, reported)`, numbers about the answers of an evaluation that are no score; `reported`
    holds the means of what the judge reported (`rewards.score.Score.metrics`). One with a `grid` may have
    `violations(example, cells)`, the rules that a wrong answer breaks and the cells of each, for the report.
    """

    reward: str | None
    grid: tuple[int, int] | None
    alphabet: str | None

    def train_examples(self, seed: int, step: int, count: int) -> list[Example]:
        """Examples of one training step; a function of its arguments, so a resumed run sees the same ones."""
        ...

    def heldout_examples(self, count: int, seed: int = 0) -> list[Example]:
        """Examples that training never sees, for the evaluations before and after it."""
        ...

    def file_examples(self, path: str) -> list[Example]:
        """Examples of a file in the task's published format."""
        ...


def column_names(rows: Iterable[Example], given: Iterable[str] = (), source: str = "the dataset") -> list[str]:
    """Every column that some row has, `prompt` left out.

    Args:
        given: columns that the trainer adds (`rl.modalities.base.Modality.reward_columns`).
        source: where the rows are from, for the message.

    Raises:
        ValueError: a column has a name that the trainer needs for itself.
    """
    names = list(dict.fromkeys(name for row in rows for name in row if name != "prompt"))
    reserved = ["completions", *CALL_ARGUMENTS, *given]
    for name in names:
        if name in reserved:
            raise ValueError(
                f"{source} has a column {name!r}, which rewards get from the trainer: rename it (reserved names: "
                "docs/rewards.md)"
            )
    return names


def reward_columns(rows: Sequence[Example], given: Iterable[str] = ()) -> dict[str, list[Any]]:
    """The columns of some rows as rewards get them, None where a row lacks one; see `column_names`.

    Example: the rows `{"prompt": "a"}` and `{"prompt": "b", "hint": "h"}` have the column `hint`, `[None, "h"]`.
    """
    return {name: [row.get(name) for row in rows] for name in column_names(rows, given)}


def split_of(content: str) -> str:
    """ "train", "validation" or "test" by a hash of a problem's own content: 14, 1 and 1 of 16.

    A problem belongs to one split whoever draws it and whenever, without a list of problems to keep.
    """
    place = hashlib.sha256(content.encode()).digest()[0] % 16
    return {0: "test", 8: "validation"}.get(place, "train")


def validation_examples(task: Task, count: int) -> list[Example]:
    """Rows to look at while training and while choosing settings; held-out rows where a task has no others."""
    rows = getattr(task, "validation_examples", None)
    return rows(count) if rows else task.heldout_examples(count)
