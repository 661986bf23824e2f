r"""Are two mathematical answers the same? Plain cases here, in microseconds; the rest is math-verify's.

What math-verify 0.9 gets wrong or surprising is settled before it is asked: `(1,2)` is an interval to it and
`(2,1)` a tuple, `4210_5` equals `4210_6`, and words are products of letters.
"""

from __future__ import annotations

import functools
import logging
import re
from fractions import Fraction
from typing import Any

NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?([eE][-+]?\d{1,3})?")
DROPPED = re.compile(
    r"(?<!\\)\\[!,;: ]|\\left(?![a-z])|\\right(?![a-z])|\\displaystyle|\\\$|\$|~"
    r"|\^\s*\{?\s*\\circ\s*\}?|\\degree|°|\\?%"
)
UNIT = re.compile(r"(?<=[\d}])\s*\\(?:text|mbox|mathrm|textrm)\s*\{\s*[^{}]*\}(?:\s*\^\s*\{?\d\}?)?\s*$")
WRAPPER = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf)\s*\{([^{}]*)\}")
BASE = re.compile(r"_\{?(\d+)\}?$")
CLOSING = {"(": ")", "[": "]", "{": "}"}


@functools.lru_cache(maxsize=8192)
def math_equal(gold: str, answer: str, ordered: bool = False) -> bool:
    r"""True when `answer` says the same as `gold`.

    Conventions: 10\% equals 10, units and a missing number base are ignored, a currency or degree sign too;
    numbers agree exactly, or to six decimals when one is a decimal fraction. Tuples and intervals must have the
    same brackets and agree item by item; bare lists (`1, -2`) and sets in any order, unless `ordered`.

    Args:
        gold: the reference answer, plain or LaTeX, without `\boxed`.
        answer: the model's answer, the same.
        ordered: compare bare lists in order (the string convention of Hendrycks' MATH).
    """
    gold, answer = clean(gold), clean(answer)
    if not answer or not gold or not _balanced(answer):
        return False
    if _squeeze(gold) == _squeeze(answer) or (_is_word(gold) and gold.lower() == answer.lower()):
        return True
    gold_number, answer_number = number_of(gold), number_of(answer)
    if gold_number is not None and answer_number is not None:
        return _close(gold_number, answer_number)
    gold_parts, answer_parts = _parts(gold), _parts(answer)
    if gold_parts or answer_parts:
        return bool(gold_parts and answer_parts) and _same_parts(*gold_parts, *answer_parts, ordered=ordered)  # type: ignore[misc]
    bases = [match.group(1) for match in map(BASE.search, (gold, answer)) if match]
    if len(bases) == 2 and bases[0] != bases[1]:
        return False
    if _is_word(gold) or _is_word(answer):
        return False  # they differ as strings
    return _math_verify(gold, answer)


def clean(text: str) -> str:
    """Strip what carries no meaning: spacing commands, currency, degree and per cent signs, units, text wrappers."""
    text = text.strip().strip("$").strip().rstrip(".").strip()
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = DROPPED.sub(lambda match: " " if match.group() in ("~", "\\ ") else "", text).strip()
    text = UNIT.sub("", text)
    text = re.sub(r"\s*\\(?:text|mbox)\{\s*(?:and|or)\s*\}\s*|\s+(?:and|or)\s+", ", ", text)
    text = WRAPPER.sub(r"\1", text).strip()
    text = re.sub(r"^\(([A-Za-z])\)$", r"\1", text)  # (C), the choice
    text = re.sub(r"^[A-Za-z]\s*(?:=|\\in(?![a-z]))\s*(?=[^=]+$)", "", text)  # x = 5, x \in [-2,7]
    return re.sub(r"(?<=\d),\s+(?=\d{3}(?:,\s*\d{3})*$)", ",", text) if "\\!" in text else text


def number_of(text: str) -> Fraction | None:
    r"""Value of a plain number, `a/b` or `\frac{a}{b}` (also `\frac12`), else None. Commas may group thousands."""
    squeezed = _squeeze(text)
    fraction = re.fullmatch(r"([-+]?)\\frac(?:\{(-?\d+)\}|(\d))(?:\{(-?\d+)\}|(\d))", squeezed)
    if fraction:
        sign, *digits = fraction.groups()
        top, bottom = (int(number) for number in digits if number is not None)
        return Fraction(-top if sign == "-" else top, bottom) if bottom else None
    top_text, slash, bottom_text = squeezed.partition("/")
    numbers = []
    for part in (top_text, bottom_text) if slash else (top_text,):
        if not re.search(r"\d", part) or not NUMBER.fullmatch(part):
            return None
        numbers.append(Fraction(part.replace(",", "").rstrip(".")))
    if len(numbers) == 1:
        return numbers[0]
    return numbers[0] / numbers[1] if numbers[1] else None


def _close(gold: Fraction, answer: Fraction) -> bool:
    if gold == answer:
        return True
    if gold.denominator == 1 and answer.denominator == 1:
        return False
    gap = abs(gold - answer)
    return gap <= Fraction(5, 10**7) and gap <= Fraction(2, 10**6) * max(abs(gold), abs(answer))


def _squeeze(text: str) -> str:
    return re.sub(r"\s", "", text)


def _balanced(text: str) -> bool:
    opened = sum(text.count(bracket) for bracket in "([{")
    return opened == sum(text.count(bracket) for bracket in ")]}")


def _is_word(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z][A-Za-z'\- ]{2,}", text) is not None


def _parts(text: str) -> tuple[str, list[str]] | None:
    r"""Bracket pair and items of a tuple, interval, set or bare list ("" as brackets); None for a single value."""
    if number_of(text) is not None:
        return None
    inner, brackets = text, ""
    if re.match(r"\\\{", text) and text.endswith("\\}"):
        inner, brackets = text[2:-2], "{}"
    elif text[0] in "([" and text[-1] in ")]" and _closes_at_end(text):
        inner, brackets = text[1:-1], text[0] + text[-1]
    items, depth, start = [], 0, 0
    for position, character in enumerate(inner):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            items.append(inner[start:position])
            start = position + 1
    items.append(inner[start:])
    items = [sign for item in items for sign in _both_signs(item)]
    if brackets == "{}":
        return brackets, items
    return (brackets, items) if len(items) > 1 else None


def _both_signs(item: str) -> list[str]:
    r"""`a \pm b` as the two values it stands for."""
    return [item.replace(r"\pm", sign) for sign in "+-"] if item.count(r"\pm") == 1 else [item]


def _closes_at_end(text: str) -> bool:
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if depth == 0:
            return position == len(text) - 1
    return False


def _same_parts(gold: str, gold_items: list[str], answer: str, answer_items: list[str], ordered: bool) -> bool:
    if len(gold_items) != len(answer_items):
        return False
    loose = {"", "{}"}  # a bare list may be given as a set
    if gold != answer and not {gold, answer} <= loose:
        return False
    if gold not in loose or (ordered and gold == ""):
        return all(math_equal(*pair, ordered=ordered) for pair in zip(gold_items, answer_items, strict=True))
    left = list(answer_items)
    for item in gold_items:
        twin = next((other for other in left if math_equal(item, other, ordered=ordered)), None)
        if twin is None:
            return False
        left.remove(twin)
    return True


def _math_verify(gold: str, answer: str) -> bool:
    math_verify, configs = _library()
    parsed = [
        math_verify.parse(f"${text}$", extraction_config=configs, parsing_timeout=None) for text in (gold, answer)
    ]
    return bool(math_verify.verify(*parsed, timeout_seconds=None))


def warm_up() -> None:
    """Import math-verify and build its LaTeX grammar, so that the first verdict is no slower than the others."""
    _math_verify(r"\frac{1}{2}", r"\frac{1}{3}")


@functools.lru_cache(maxsize=1)
def _library() -> tuple[Any, list[Any]]:
    import math_verify  # with sympy; `import rewards` must not pay for it

    # Its own timeouts are signals, which belong to the trainer; ours are in `math_answer` and in the runner.
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).addFilter(lambda record: "Timeout is disabled" not in record.getMessage())
    return math_verify, [math_verify.LatexExtractionConfig(), math_verify.ExprExtractionConfig()]
