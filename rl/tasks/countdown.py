"""Countdown: reach a target from given numbers, each used exactly once (reward by exact arithmetic)."""

from __future__ import annotations

import random
from fractions import Fraction

from rl.tasks import templates
from rl.tasks.base import Example
from rl.tasks.drawn import DrawnTask
from rl.tasks.records import read_records


class CountdownTask(DrawnTask):
    """Prompt `3,7,12=45:`, response an expression such as `(12+3)*3`, ended by end tokens."""

    reward = "countdown"
    grid = None
    alphabet = "0123456789+-*/(),=:"
    templates = templates.COUNTDOWN

    def __init__(
        self,
        count: int = 3,
        max_number: int = 20,
        max_target: int = 99,
        operators: str = "+-*/",
        fixed_width: bool = False,
    ):
        """
        Args:
            count: numbers per problem.
            max_number: numbers are drawn from 1 to this.
            max_target: targets lie in 1 to this.
            operators: what problems are made with; an answer may use all four.
            fixed_width: the prompt's numbers have leading zeros, so that each stands at one place whatever its size; a
                small model with learned positions then learns several times faster. Answers have none: `03` is no
                number of an expression.
        """
        if count < 2 or max_number < 2 or max_target < 1:
            raise ValueError("task.params needs count >= 2, max_number >= 2 and max_target >= 1")
        if not isinstance(operators, str) or not operators or not set(operators) <= set("+-*/"):
            raise ValueError(f"task.params.operators {operators!r} must be some of + - * /")
        self.count, self.max_number, self.max_target = count, max_number, max_target
        self.operators, self.fixed_width = operators, fixed_width

    def file_examples(self, path: str) -> list[Example]:
        """Problems of a JSON-lines file with `input` ("30,100,93") and `output` (the target)."""
        rows = []
        for number, record in enumerate(read_records(path), start=1):
            where = f"{path}: row {number}"
            try:
                numbers, target = [int(n) for n in str(record["input"]).split(",")], int(record["output"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{where}: expected input (numbers with commas) and output") from None
            if self.fixed_width and (max(numbers) > self.max_number or target > self.max_target):
                raise ValueError(f"{where}: larger than task.params.fixed_width has room for: set it to false")
            rows.append(self._row(numbers, target))
        return rows

    def _row(self, numbers: list[int], target: int) -> Example:
        widths = (len(str(self.max_number)), len(str(self.max_target))) if self.fixed_width else (1, 1)
        given = ",".join(f"{number:0{widths[0]}}" for number in numbers)
        return {"prompt": f"{given}={target:0{widths[1]}}:", "numbers": numbers, "target": target}

    def _propose(self, rng: random.Random) -> tuple[str, tuple[list[int], int, str]] | None:
        numbers = [rng.randint(1, self.max_number) for _ in range(self.count)]
        drawn = _random_expression(rng, numbers, self.operators)
        if drawn is None or drawn[1].denominator != 1 or not 1 <= drawn[1] <= self.max_target:
            return None
        answer, value = drawn
        # Numbers in any order, so that a problem has one split whoever draws it.
        return f"{sorted(numbers)} {value}", (numbers, int(value), answer)

    def _shown(self, problem: tuple[list[int], int, str], rng: random.Random) -> Example:
        numbers, target, answer = problem
        return self._row(rng.sample(numbers, len(numbers)), target) | {"answer": answer}

    def _used_up(self, found: int, count: int, split: str) -> None:
        """Fewer than `count` will do."""
        if not found:
            raise ValueError("task.params leave no Countdown problems: allow larger numbers or targets")


def _random_expression(rng: random.Random, numbers: list[int], operators: str) -> tuple[str, Fraction] | None:
    """Join random pairs until one expression is left; brackets only where needed. None for a division by zero."""
    # (text, value, precedence): 3 a number, 2 a product or quotient, 1 a sum or difference.
    parts = [(str(n), Fraction(n), 3) for n in numbers]
    while len(parts) > 1:
        left, right = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
        sign = rng.choice(operators)
        if sign == "/" and right[1] == 0:
            return None
        level = 1 if sign in "+-" else 2
        a = f"({left[0]})" if left[2] < level else left[0]
        b = f"({right[0]})" if right[2] < level or (right[2] == level and sign in "-/") else right[0]
        value = {
            "+": lambda x, y: x + y,
            "-": lambda x, y: x - y,
            "*": lambda x, y: x * y,
            "/": lambda x, y: x / y,
        }[sign](left[1], right[1])
        parts.append((f"{a}{sign}{b}", value, level))
    return parts[0][0], parts[0][1]
