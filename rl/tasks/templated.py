"""Short tasks for a small language model, drawn from templates of our own; every one has a verifier."""

from __future__ import annotations

import random
from typing import Any

from rewards.instructions import CONSTRAINTS
from rl.tasks.base import Example
from rl.tasks.drawn import DrawnTask
from rl.tasks.words import NOUNS

_STORIES = (
    ("{who} has {a} {things} and buys {b} more. How many {things} does {who} have now?", "a + b"),
    ("{who} had {a} {things} and gave away {b}. How many {things} are left?", "a - b"),
    ("A box holds {a} {things}. {who} has {b} boxes. How many {things} are there in all?", "a * b"),
    ("{who} has {a} bags of {b} {things} each and finds {c} more. How many {things} is that?", "a * b + c"),
    ("{who} shares {a} {things} equally among {b} friends. How many does each friend get?", "a // b"),
    ("{who} makes {a} {things} a day for {b} days and sells {c}. How many {things} are left?", "a * b - c"),
)
_NAMES = ("Ada", "Ben", "Clara", "Dan", "Emma", "Finn", "Grace", "Hugo", "Iris", "Jack")
_THINGS = ("apples", "books", "candles", "eggs", "flowers", "kites", "lemons", "pencils", "shells", "stamps")

# Description, body, arguments to test with.
_FUNCTIONS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("x times {a} plus {b}", "x * {a} + {b}", (0, 3, -7)),
    ("the remainder of x divided by {a}, plus {b}", "x % {a} + {b}", (0, 25, 101)),
    ("True if x is larger than {a} and smaller than {b}{a}, else False", "{a} < x < {b}{a}", (0, 10, 99)),
    ("the text x without its first {a} characters, {b} times in a row", "x[{a}:] * {b}", ("abcdefghijklmnop", "ab")),
    ("the items of list x that are at least {a}, each times {b}", "[n * {b} for n in x if n >= {a}]", ([1, 5, 20],)),
    ("the sum of the list x times {a}, minus {b}", "sum(x) * {a} - {b}", ([], [4, 5, -2])),
    ("the larger of x plus {a} and {b} times x", "max(x + {a}, {b} * x)", (-4, 1, 12)),
)  # fmt: skip


class _Templated(DrawnTask):
    """Problems of a few numbers or words; each has its split by its own content."""

    grid = None
    alphabet = None

    def _shown(self, problem: Example, rng: random.Random) -> Example:
        return problem

    def _used_up(self, found: int, count: int, split: str) -> None:
        raise ValueError(
            f"the task has only {found} {split} problems where {count} are asked for: allow larger numbers"
        )

    def file_examples(self, path: str) -> list[Example]:
        raise ValueError(f"this task draws its problems and reads no file: take task.name=jsonl for {path}")


class SumsTask(_Templated):
    """`What is 17 + 25? Give the number only.`, judged by `math_answer`."""

    reward = "math_answer"

    def __init__(self, max_number: int = 49, signs: str = "+"):
        """
        Args:
            max_number: numbers are drawn from 1 to this.
            signs: some of + - *.
        """
        if max_number < 2 or not signs or not set(signs) <= set("+-*"):
            raise ValueError(
                f"task.params: max_number {max_number} must be at least 2, and signs {signs!r} some of + - *"
            )
        self.max_number, self.signs = max_number, signs

    def _propose(self, rng: random.Random) -> tuple[str, Example]:
        a, b, sign = rng.randint(1, self.max_number), rng.randint(1, self.max_number), rng.choice(self.signs)
        value = {"+": a + b, "-": a - b, "*": a * b}[sign]
        content = f"{min(a, b)} {sign} {max(a, b)}"
        return content, {"prompt": f"What is {a} {sign} {b}? Give the number only.", "answer": str(value)}


class StoriesTask(_Templated):
    """Word problems of one or two steps in the form of GSM8K, with small numbers, judged by `math_answer`.

    A template with its numbers is one problem, whoever has the apples.
    """

    reward = "math_answer"

    def __init__(self, max_number: int = 12):
        """
        Args:
            max_number: numbers are drawn from 2 to this.
        """
        if max_number < 6:
            raise ValueError(f"task.params.max_number must be at least 6, got {max_number}")
        self.max_number = max_number

    def _propose(self, rng: random.Random) -> tuple[str, Example] | None:
        index = rng.randrange(len(_STORIES))
        text, formula = _STORIES[index]
        numbers = {name: rng.randint(2, self.max_number) for name in "abc"}
        if "//" in formula:
            numbers["a"] *= numbers["b"]
        value = eval(formula, {}, numbers)
        if value < 0:
            return None
        used = [numbers[name] for name in "abc" if f"{{{name}}}" in text]
        prompt = text.format(who=rng.choice(_NAMES), things=rng.choice(_THINGS), **numbers)
        return f"{index} {used}", {"prompt": prompt, "answer": str(value)}


class InstructionsTask(_Templated):
    """`Write about the piano. Use at most 9 words. Begin with the word "every".`, judged by `instructions`."""

    reward = "instructions"

    def __init__(self, count: int = 2):
        """
        Args:
            count: instructions per prompt, of different kinds.
        """
        if not 1 <= count <= 3:
            raise ValueError(f"task.params.count must be 1, 2 or 3, got {count}")
        self.count = count

    def _propose(self, rng: random.Random) -> tuple[str, Example] | None:
        word = rng.choice(NOUNS)
        arguments: dict[str, Any] = {
            "at_most": rng.randint(8, 20), "at_least": rng.randint(5, 12), "sentences": rng.randint(2, 3),
            "lines": rng.randint(2, 4), "word": rng.choice(NOUNS), "without_letter": rng.choice("bcdfgklmpuwy"),
            "case": rng.choice(("capital", "small")), "last_word": rng.choice(("again", "home", "night", "together")),
            "first_word": rng.choice(("every", "nobody", "once", "some", "today")),
        }  # fmt: skip
        kinds = rng.sample(sorted(arguments), self.count)
        if {"at_most", "at_least"} <= set(kinds) or ("without_letter" in kinds and len(kinds) > 1):
            return None  # They may exclude each other.
        asked = " ".join(CONSTRAINTS[kind][0].format(arguments[kind]) for kind in kinds)
        constraints = [[kind, arguments[kind]] for kind in kinds]
        return f"{word} {sorted(constraints)}", {
            "prompt": f"Write about the {word}. {asked}",
            "constraints": constraints,
        }


class OneLinerTask(_Templated):
    """`Write a one-line Python function f(x) that returns x times 3 plus 4.`, judged by `code_tests` in its sandbox."""

    reward = "code_tests"

    def _propose(self, rng: random.Random) -> tuple[str, Example]:
        text, body, arguments = rng.choice(_FUNCTIONS)
        a, b = rng.randint(2, 9), rng.randint(2, 9)
        function = f"def f(x): return {body.format(a=a, b=b)}"
        scope: dict[str, Any] = {}
        exec(function, scope)
        tests = [f"assert f({x!r}) == {scope['f'](x)!r}" for x in arguments]
        prompt = f"Write a one-line Python function f(x) that returns {text.format(a=a, b=b)}. Give the code only."
        return f"{body} {a} {b}", {"prompt": prompt, "answer": function, "tests": tests}
