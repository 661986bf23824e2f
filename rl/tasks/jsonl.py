"""Any JSON-lines, JSON, CSV or Parquet file as a task."""

from __future__ import annotations

import random

from rl.tasks.base import Row
from rl.tasks.records import read_records


class JsonlTask:
    """Prompts from files, in an order that depends on (seed, epoch) only."""

    grid = None
    alphabet = None

    def __init__(
        self,
        train: str,
        heldout: str | None = None,
        validation: str | None = None,
        prompt_column: str = "prompt",
        answer_column: str | None = None,
        template: str = "{prompt}",
        reward: str = "math_answer",
    ):
        """
        Args:
            train: file of training rows.
            heldout: file of rows for the evaluations before and after training.
            validation: file of rows for the evaluations on the way; those of `heldout` when None.
            prompt_column, answer_column: which columns are the prompt and the text to imitate.
            template: text around a prompt; `{prompt}` stands for it.
        """
        self.reward = reward
        self._template, self._prompt, self._answer = template, prompt_column, answer_column
        self._train = self.file_rows(train)
        self._shuffled: tuple[tuple[int, int], list[int]] | None = None
        self._heldout = self.file_rows(heldout) if heldout else []
        self._validation = self.file_rows(validation) if validation else self._heldout

    def train_rows(self, seed: int, step: int, count: int) -> list[Row]:
        rows: list[Row] = []
        orders: dict[int, list[int]] = {}
        for index in range(step * count, (step + 1) * count):
            epoch, place = divmod(index, len(self._train))
            if epoch not in orders:
                orders[epoch] = list(range(len(self._train)))
                random.Random(f"{seed} {epoch}").shuffle(orders[epoch])
            rows.append(self._train[orders[epoch][place]])
        return rows

    def validation_rows(self, count: int) -> list[Row]:
        return self._validation[:count]

    def heldout_rows(self, count: int, seed: int = 0) -> list[Row]:
        if not self._heldout:
            raise ValueError("task.params.heldout is not set: name a file of held-out rows")
        return self._heldout[:count]

    def file_rows(self, path: str) -> list[Row]:
        rows = []
        for number, record in enumerate(read_records(path), start=1):
            for column in (self._prompt, self._answer):
                if column is not None and column not in record:
                    raise ValueError(f"{path}: row {number} has no column {column!r}; it has {', '.join(record)}")
            row = dict(record)
            row["prompt"] = self._template.replace("{prompt}", str(record[self._prompt]))
            if self._answer:
                row["answer"] = str(record[self._answer])
            rows.append(row)
        return rows
