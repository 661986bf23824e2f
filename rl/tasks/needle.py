"""Needle in a haystack: one sentence with a number stands somewhere in a long text, and the prompt asks for the number.

The measure of LongLLaDA (arXiv 2506.14429), by context length and depth, on sentences drawn here: no text is
downloaded, and lengths are counted in words, since a task knows no tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import product

from rewards.math_answer import MathAnswer
from rl.tasks.base import Example
from rl.tasks.drawn import DrawnTask
from rl.tasks.records import read_records
from rl.tasks.words import NOUNS

_HAY = (
    "The {} was left beside the {} for a long time.",
    "Nobody knew why the {} and the {} looked so much alike.",
    "In the evening a {} could be seen behind the {}.",
    "Someone had painted the {} in the colours of the {}.",
    "There was talk of a {} that had once belonged to the {}.",
)
_NEEDLE = "The secret number of the {} is {}."


class NeedleTask(DrawnTask):
    """Prompt: sentences, one of them `The secret number of the owl is 48213.`, and the question.

    The i-th row of a split has the i-th pair of length and depth, round after round: all are asked equally often.
    """

    reward = "math_answer"
    grid = None
    alphabet = None

    def __init__(
        self, lengths: Sequence[int] = (1000, 2000, 4000), depths: Sequence[int] = (0, 25, 50, 75, 100), others: int = 0
    ):
        """
        Args:
            lengths: words of the haystack.
            depths: how deep the needle stands, in percent of the sentences: 0 is the first, 100 the last.
            others: needles of other nouns, which a model must not answer with.
        """
        if not lengths or min(lengths) < 20:
            raise ValueError("task.params.lengths must be numbers of words, 20 or more each")
        if not depths or not all(0 <= depth <= 100 for depth in depths):
            raise ValueError("task.params.depths must be percents, 0 to 100")
        if not 0 <= others < len(NOUNS):
            raise ValueError(f"task.params.others must be 0 to {len(NOUNS) - 1}")
        self.cells, self.others = list(product(lengths, depths)), others

    def file_examples(self, path: str) -> list[Example]:
        """Rows of a file with `prompt` and `answer`; `length` and `depth`, where given, are measured by."""
        rows = []
        for number, record in enumerate(read_records(path), start=1):
            if not record.get("prompt") or record.get("answer") in (None, ""):
                raise ValueError(f"{path}: row {number} needs prompt and answer")
            rows.append({**record, "answer": str(record["answer"])})
        return rows

    def measure(
        self, examples: Sequence[Example], completions: Sequence[str], reported: Mapping[str, float]
    ) -> dict[str, float]:
        """What the judge reported, and the share of right answers by length and by depth."""
        judge = MathAnswer()
        scores = judge(list(completions), list(completions), [row["answer"] for row in examples])
        found: dict[str, list[float]] = {}
        for row, score in zip(examples, scores, strict=True):
            for name in ("length", "depth"):
                if name in row:
                    found.setdefault(f"{name}_{row[name]}", []).append(float(score.value or 0.0))
        return {**reported, **{name: sum(right) / len(right) for name, right in found.items()}}

    def _draw(self, key: str, count: int, split: str, distinct: bool = False) -> list[Example]:
        rng = random.Random(f"hay {key}")
        return [
            self._laid_out(row, *self.cells[i % len(self.cells)], rng)
            for i, row in enumerate(super()._draw(key, count, split, distinct))
        ]

    def _propose(self, rng: random.Random) -> tuple[str, Example]:
        noun, number = rng.choice(NOUNS), rng.randrange(10_000, 100_000)
        return f"{noun} {number}", {"noun": noun, "answer": str(number)}

    def _shown(self, problem: Example, rng: random.Random) -> Example:
        return problem

    def _used_up(self, found: int, count: int, split: str) -> None:
        raise ValueError(f"the task needle has only {found} {split} rows where {count} are asked for")

    def _laid_out(self, row: Example, length: int, depth: int, rng: random.Random) -> Example:
        others = rng.sample([noun for noun in NOUNS if noun != row["noun"]], self.others)
        needles = [_NEEDLE.format(noun, rng.randrange(10_000, 100_000)) for noun in others]
        hay, words = [], sum(len(needle.split()) for needle in needles)
        while words < length:
            hay.append(rng.choice(_HAY).format(*rng.sample(NOUNS, 2)))
            words += len(hay[-1].split())
        for needle in needles:
            hay.insert(rng.randrange(len(hay) + 1), needle)
        hay.insert(round(depth / 100 * len(hay)), _NEEDLE.format(row["noun"], row["answer"]))
        question = f"What is the secret number of the {row['noun']}? Answer with the number alone."
        return {**row, "prompt": f"{' '.join(hay)}\n\n{question}", "length": length, "depth": depth}
