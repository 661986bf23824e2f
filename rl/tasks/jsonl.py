"""Any JSON-lines, JSON, CSV or Parquet file, or split of a dataset on the hub, as a task."""

from __future__ import annotations

import random
from typing import Any

from rl.tasks.base import Example
from rl.tasks.chat import Message, checked_chat
from rl.tasks.fit import FileExamples, StreamedExamples
from rl.tasks.records import Record, records_at, stream_at


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
        reward: str | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 10_000,
    ):
        """
        Args:
            train: file of training rows, or `owner/name:split` on the hub (`rl.tasks.records.records_at`).
            heldout: file of rows for the evaluations before and after training.
            validation: file of rows for the evaluations on the way; those of `heldout` when None.
            prompt_column, answer_column: which columns are the prompt and what supervised training imitates; text, or
                messages (`rl.tasks.chat`). The same column for both is a conversation whose last turn is the answer.
            reward: the verifier of evaluations; None lets `reward.functions` judge, and math_answer without them.
            template: text around a prompt; `{prompt}` stands for it.
            streaming: read `train` while it is drawn from, never whole (`rl.tasks.fit.StreamedExamples`); a pattern of
                files (`data/*.parquet`) then works too.
            shuffle_buffer: rows of a stream that are mixed, and held in memory.
        """
        if not isinstance(streaming, bool) or not isinstance(shuffle_buffer, int) or shuffle_buffer < 1:
            raise ValueError(
                "task.params: streaming is true or false, shuffle_buffer a number of rows from 1 on, got "
                f"{streaming!r} and {shuffle_buffer!r}"
            )
        if "{prompt}" not in template:
            raise ValueError(f"task.params.template {template!r} has no {{prompt}}, which stands for the prompt")
        self.reward = reward
        self._template, self._prompt, self._answer = template, prompt_column, answer_column
        self._train: FileExamples
        if streaming:
            self._train = StreamedExamples(train, stream_at(train), self._example, shuffle_buffer)
        else:
            self._train = FileExamples(train, self.file_examples(train))
        self._heldout = FileExamples(heldout, self.file_examples(heldout)) if heldout else None
        self._validation = FileExamples(validation, self.file_examples(validation)) if validation else self._heldout

    @property
    def files(self) -> list[FileExamples]:
        """The files there are, each once; see `rl.tasks.fit`."""
        return list({id(file): file for file in (self._train, self._validation, self._heldout) if file}.values())

    def train_examples(self, seed: int, step: int, count: int) -> list[Example]:
        if isinstance(self._train, StreamedExamples):
            return self._train.drawn(seed, step * count, count)
        rows: list[Example] = []
        orders: dict[int, list[int]] = {}
        examples = self._train.examples
        for index in range(step * count, (step + 1) * count):
            epoch, place = divmod(index, len(examples))
            if epoch not in orders:
                orders[epoch] = list(range(len(examples)))
                random.Random(f"{seed} {epoch}").shuffle(orders[epoch])
            rows.append(examples[orders[epoch][place]])
        return rows

    def validation_examples(self, count: int) -> list[Example]:
        return self._validation.examples[:count] if self._validation else []

    def heldout_examples(self, count: int, seed: int = 0) -> list[Example]:
        if not self._heldout:
            raise ValueError("task.params.heldout is not set: name a file of held-out rows")
        return self._heldout.examples[:count]

    def file_examples(self, path: str) -> list[Example]:
        records = records_at(path)
        for option, column in (("prompt_column", self._prompt), ("answer_column", self._answer)):
            if column is not None and column not in records[0]:
                raise ValueError(
                    f"{path} has no column {column!r}; it has {', '.join(records[0])}: add it, or set "
                    f"task.params.{option}"
                )
        return [self._example(record, f"{path}: row {number}") for number, record in enumerate(records, start=1)]

    def _example(self, record: Record, where: str) -> Example:
        # Only a row of a stream can be without the column.
        if self._prompt not in record:
            raise ValueError(f"{where} has no column {self._prompt!r}; it has {', '.join(record)}")
        prompt = _cell(record[self._prompt], f"{where}: column {self._prompt!r}")
        if prompt is None:
            raise ValueError(f"{where} has no {self._prompt!r}: fill it in, or leave the row out")
        example = dict(record)
        if self._answer == self._prompt:
            # A whole conversation: its last turn is the answer.
            if isinstance(prompt, str) or len(prompt) < 2 or prompt[-1]["role"] != "assistant":
                raise ValueError(f"{where}: column {self._prompt!r} must be messages that end with the assistant's")
            prompt, example["answer"] = prompt[:-1], prompt[-1:]
        elif self._answer:
            example["answer"] = _cell(record.get(self._answer), f"{where}: column {self._answer!r}")
        if record.get("tools"):
            raise ValueError(f"{where}: column 'tools': tool use is out of scope: remove the column")
        if isinstance(prompt, str):
            prompt = self._template.replace("{prompt}", prompt)
        elif sum(turn["role"] == "user" for turn in prompt) > 1:
            raise ValueError(
                f"{where}: column {self._prompt!r} is a conversation of several user turns, which is out of scope: "
                "give the last turn alone, or all as text (tokenizer.apply_chat_template)"
            )
        elif self._template != "{prompt}":
            raise ValueError(f"{where}: task.params.template is for prompts of text, and this one is a chat")
        return example | {"prompt": prompt}


def _cell(value: Any, where: str) -> str | list[Message] | None:
    """Text (also of a number), messages, or None for a missing one."""
    if isinstance(value, list):
        return checked_chat(value, where)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | dict):
        raise ValueError(f"{where} must be text or messages, not {type(value).__name__}")
    return str(value)
