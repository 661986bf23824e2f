"""Any reasoning-gym task as prompts (`pip install denoise-rl[gym]`), judged by its own verifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rl.tasks.base import Example, split_of
from rl.tasks.records import read_records
from rl.tasks.templates import Template


def gym_tasks() -> list[str]:
    """Names of the installed reasoning-gym's tasks; empty when it is not installed."""
    try:
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError:
        return []
    return list(DATASETS)


class GymTask:
    """Questions drawn by reasoning-gym; named `reasoning_gym:TASK`, or TASK where no other task has that name."""

    grid = None
    alphabet = None

    def __init__(self, name: str, options: Mapping[str, Any] | None = None):
        """
        Args:
            name: a reasoning-gym dataset.
            options: its parameters, for example {max_animals: 4}.

        Raises:
            ValueError: unknown name or parameter, or reasoning-gym is not installed.
        """
        import difflib

        known = gym_tasks()
        if not known:
            raise ValueError(f"task.name reasoning_gym:{name} needs the package: pip install 'denoise-rl[gym]'")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(f"reasoning-gym has no task {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
        from reasoning_gym.utils import SYSTEM_PROMPTS

        self.name, self.options = name, dict(options or {})
        self.reward = f"reasoning_gym:{name}"
        self.origin = f"reasoning_gym {name} {self.options or ''}".strip()
        self.templates = (
            Template(
                "reasoning_gym", "{question}", "reasoning-gym's default system prompt", chat=True,
                system=SYSTEM_PROMPTS["default"],
            ),
            Template("question", "{question}", "reasoning-gym's question alone"),
        )  # fmt: skip

    def train_examples(self, seed: int, step: int, count: int) -> list[Example]:
        return self._draw(seed, step * count, count, "train")

    def validation_examples(self, count: int) -> list[Example]:
        return self._draw(0, 0, count, "validation")

    def heldout_examples(self, count: int, seed: int = 0) -> list[Example]:
        return self._draw(seed, 0, count, "test")

    def file_examples(self, path: str) -> list[Example]:
        """Items in reasoning-gym's own form: `question`, `answer`, `metadata`."""
        items = read_records(path)
        if not {"question", "answer", "metadata"} <= items[0].keys():
            raise ValueError(
                f"{path} must have the columns question, answer and metadata; it has {', '.join(items[0])}"
            )
        for number, item in enumerate(items, start=1):
            if not isinstance(item["question"], str) or not isinstance(item["metadata"], dict):
                raise ValueError(f"{path}: row {number} has no question or no metadata")
        return [self._row(item, index) for index, item in enumerate(items)]

    def _draw(self, seed: int, first: int, count: int, split: str) -> list[Example]:
        import reasoning_gym

        # A question belongs to one split by its own text; so many tries per row that the rarest split fills up too.
        tries = range(64 * first, 64 * (first + count))
        try:
            dataset = reasoning_gym.create_dataset(self.name, seed=seed * 2**24, size=tries.stop, **self.options)
        except (TypeError, AssertionError) as error:
            raise ValueError(f"task.params.options of {self.name}: {error}") from None
        rows: list[Example] = []
        seen: set[str] = set()
        for index in tries:
            item = dataset[index]  # a function of seed + index: a long dataset costs nothing
            if split_of(item["question"]) == split and item["question"] not in seen:
                seen.add(item["question"])
                rows.append(self._row(item, len(rows)))
                if len(rows) == count:
                    return rows
        raise ValueError(f"reasoning-gym task {self.name} has too few different questions for {count} {split} rows")

    def _row(self, item: Mapping[str, Any], index: int) -> Example:
        row = {
            "prompt_id": f"{self.name}/{index}",
            "prompt": item["question"],
            "question": item["question"],
            "metadata": item["metadata"],
        }
        return row if item["answer"] is None else row | {"answer": str(item["answer"])}
