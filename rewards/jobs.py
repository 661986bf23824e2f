"""The unit of work between the runner and the workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards.text import as_messages, is_chat


@dataclass(frozen=True)
class Job:
    """Call part number `part` on the completions `indices` of the batch; `attempt` counts retries from 0."""

    part: int
    indices: Sequence[int]
    attempt: int = 0


@dataclass
class Batch:
    """B completions with everything a reward may ask about them.

    Attributes:
        prompts: [B] texts, or chats: lists of messages `{"role": ..., "content": ...}`.
        completions: [B] texts; where the prompt is a chat, a chat of one assistant message (as TRL has it).
        columns: name -> [B] values.
        trainer_state: one object for the whole batch.
        extra: filled by the runner with what rewards logged through `log_extra`.
    """

    prompts: list[Any]
    completions: list[Any]
    columns: dict[str, Sequence[Any]]
    trainer_state: Any = None
    extra: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.completions):
            raise ValueError(f"{len(self.prompts)} prompts but {len(self.completions)} completions; give one of each")
        pairs = zip(self.prompts, self.completions, strict=True)
        self.completions = [as_messages(text, "assistant") if is_chat(prompt) else text for prompt, text in pairs]
        for name, values in self.columns.items():
            if len(values) != len(self.prompts):
                raise ValueError(f"column '{name}' has {len(values)} entries for {len(self.prompts)} completions")
            if name in ("prompts", "completions", "trainer_state", "log_extra", "log_metric"):
                raise ValueError(f"a dataset column may not be called '{name}': rewards get that argument already")

    def __len__(self) -> int:
        return len(self.completions)

    def select(
        self, indices: Sequence[int], renamed: Mapping[str, str]
    ) -> tuple[list[Any], list[Any], dict[str, list[Any]]]:
        """Prompts, completions and columns of the completions `indices`.

        Args:
            indices: which completions.
            renamed: reward argument -> column; that column is handed over under both names.

        Raises:
            ValueError: when a renamed column does not exist.
        """
        columns = {name: [values[index] for index in indices] for name, values in self.columns.items()}
        for argument, column in renamed.items():
            if column not in self.columns:
                raise ValueError(f"reward column '{argument}: {column}': the dataset has only {sorted(self.columns)}")
            columns[argument] = [self.columns[column][index] for index in indices]
        return [self.prompts[i] for i in indices], [self.completions[i] for i in indices], columns
