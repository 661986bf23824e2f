"""Countdown: reach a target from given numbers with + - * / and brackets, every number used exactly once."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from rewards.score import Score
from rewards.text import answer_part, last_boxed, text_of

SIGNS = str.maketrans({"\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-", "\u2013": "-"})
LATEX_SIGNS = {r"\times": "*", r"\cdot": "*", r"\div": "/", r"\left": "", r"\right": ""}
MAX_CHARACTERS = 400
OPERATIONS = (ast.Add, ast.Sub, ast.Mult, ast.Div)


def countdown(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    numbers: Sequence[Sequence[int] | str],
    target: Sequence[float | str],
    valid_reward: float = 0.0,
    use_all: bool = True,
    **columns: Any,
) -> list[Score]:
    r"""1.0 when the expression is right, `valid_reward` when it is legal but misses the target, else 0.0.

    The expression is read from the last `<answer>` tag, else the last `\boxed{}`, else the last line that is not
    empty; what follows a `=` is ignored. Arithmetic is exact (fractions). Only + - * / and brackets count: `**`,
    `//` and names are wrong, not evaluated.

    Args:
        prompts: not read.
        completions: text or chat messages.
        numbers: the given numbers of each row, `[30, 100, 93]` or `"30,100,93"`.
        target: the number to reach.
        valid_reward: reward of an expression that uses the right numbers and gives another value.
        use_all: False lets an expression leave numbers out.
    """
    rows = zip(completions, numbers, target, strict=True)
    return [_score_one(text_of(text), given, goal, valid_reward, use_all) for text, given, goal in rows]


def _score_one(
    completion: str, numbers: Sequence[int] | str, target: float | str, valid_reward: float, use_all: bool
) -> Score:
    given = Counter(int(number) for number in (re.findall(r"-?\d+", numbers) if isinstance(numbers, str) else numbers))
    expression = expression_of(completion)
    value = evaluate(expression)
    used = Counter(int(number) for number in re.findall(r"\d+", expression[:MAX_CHARACTERS]))
    legal = value is not None and (used == given if use_all else used <= given)
    right = legal and value == Fraction(str(target))
    return Score(1.0 if right else valid_reward if legal else 0.0, metrics={"legal": float(legal)})


def expression_of(completion: str) -> str:
    """The arithmetic expression a completion answers with, ready for `evaluate`; "" when there is none."""
    text = answer_part(completion)
    boxed = last_boxed(text)
    lines = [line for line in (text if boxed is None else boxed).splitlines() if line.strip()]
    expression = (lines[-1] if lines else "").translate(SIGNS)
    for latex, sign in LATEX_SIGNS.items():
        expression = expression.replace(latex, sign)
    return expression.split("=")[0].strip().strip("$").strip()


def evaluate(expression: str) -> Fraction | None:
    """Exact value of an expression of whole numbers, + - * / and brackets; None when it is anything else."""
    if len(expression) > MAX_CHARACTERS or not re.fullmatch(r"[\d\s+\-*/()]+", expression):
        return None
    try:
        return _value(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and isinstance(node.op, OPERATIONS):
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        return left * right if isinstance(node.op, ast.Mult) else left / right
    raise ValueError("not plain arithmetic")
