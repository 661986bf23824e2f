r"""Are two mathematical answers the same? Read in full or not at all: nothing is taken from a part of an answer.

Plain numbers are settled here in microseconds; `math_text` makes tokens of the rest, this module finds the form (list,
tuple, interval, set, matrix, equation, words), and `math_value` compares the expressions inside.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from fractions import Fraction

from rewards.math_forms import same_forms
from rewards.math_text import is_word, normalise, split_unit, tokenise
from rewards.math_value import Number, UnreadableError, sample

NUMBER = re.compile(r"[-+]?(?=\.?\d)(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?([eE][-+]?\d{1,3})?")
FRACTION = re.compile(r"([-+]?)\\[dt]?frac(?:\{(-?\d+)\}|(\d))(?:\{(-?\d+)\}|(\d))")
NAME = re.compile(r"(?:[A-Za-z]+|\\[a-z]+)(?:_(?:\w|\{\w+\}))?'*(?:\([a-z](?:,[a-z])*\))?")
DATE = re.compile(r"\d{4}([-/.])\d{1,2}\1\d{1,2}|\d{1,2}([-/.])\d{1,2}\2\d{4}")
RELATIONS = {"=", "<", ">", r"\le", r"\ge", r"\neq", r"\in", r"\approx"}
FLIPPED = {">": "<", r"\ge": r"\le"}
LOOSE = {"list", "{}"}  # in any order
INTERVALS = {"()", "[]", "(]", "[)"}
PARTED = re.compile(r"\s+(?!\d)|(?<![\d,])\s+")  # spaces that part no numbers
CHOICE = re.compile(r"(?:(?:option|choice)\s+)?\(?([A-Z])(?:[).:](?:\s+[^()]{2,})?)?", re.IGNORECASE)
OPENING, CLOSING = {"(", "[", "{", r"\{"}, {")", "]", "}", r"\}"}
MAX_CHARACTERS = 2000


@dataclass(frozen=True)
class Answer:
    r"""An answer in its parts.

    Example: `x \in [1, 2)` is `Answer("[)", (1, 2), name="x")`, where 1 and 2 are `Answer("value", tokens=("1",))`.

    Attributes:
        kind: "value", "words", "list", "\cup", "matrix", "row", "{}" for a set, "()", "[]", "(]" or "[)", "relation",
            ":" for a ratio or time of day, "date".
        items: its parts.
        tokens: of a value, words or date; of a relation its signs.
        unit: see `math_text.split_unit`.
        name: what stands before the equals sign.
    """

    kind: str
    items: tuple[Answer, ...] = ()
    tokens: tuple[str, ...] = ()
    unit: str = ""
    name: str = ""


@functools.lru_cache(maxsize=8192)
def math_equal(gold: str, answer: str, ordered: bool = False) -> bool:
    r"""True when `answer` says the same as `gold`.

    Numbers agree exactly, or to six decimals when one is a decimal fraction; an answer that cannot be read equals only
    itself. docs/rewards.md has all conventions.

    Args:
        gold: the reference answer, plain or LaTeX, without `\boxed`.
        answer: the model's answer, the same.
        ordered: compare bare lists in order (the string convention of Hendrycks' MATH).
    """
    if max(len(gold), len(answer)) > MAX_CHARACTERS:
        return False
    if PARTED.sub("", gold.strip()) == PARTED.sub("", answer.strip()):
        return bool(gold.strip())
    gold_number, answer_number = number_of(gold), number_of(answer)
    if gold_number is not None and answer_number is not None:
        return _close(gold_number, answer_number)
    gold, answer = normalise(gold), normalise(answer)
    letters = [CHOICE.fullmatch(text) for text in (gold, answer)]
    if letters[0] and letters[1] and min(len(gold), len(answer)) <= 3:
        return letters[0].group(1).upper() == letters[1].group(1).upper()
    gold_tokens, answer_tokens = tokenise(gold), tokenise(answer)
    if gold_tokens == answer_tokens:
        return bool(gold_tokens)
    try:
        same = _same(read(gold_tokens), read(answer_tokens), ordered)
    except (UnreadableError, RecursionError):
        same = False
    return same or same_forms(gold_tokens, answer_tokens)


def is_readable(text: str) -> bool:
    """True when `text` is mathematics from its first token to its last (words after a number may be its unit)."""
    try:
        leaves = [read(tokenise(normalise(text)))]
        for leaf in leaves:
            leaves += leaf.items
            if leaf.kind == "value":
                sample(leaf.tokens)
        return all(leaf.kind != "words" for leaf in leaves)
    except (UnreadableError, RecursionError):
        return False


def number_of(text: str) -> Fraction | None:
    r"""Value of a plain number, `a/b` or `\frac{a}{b}` (also `\frac12`), else None. Commas may group thousands."""
    text = text.strip().strip("$").strip().rstrip(".")
    fraction = FRACTION.fullmatch(text)
    if fraction:
        sign, *digits = fraction.groups()
        top, bottom = (int(number) for number in digits if number is not None)
        return Fraction(-top if sign == "-" else top, bottom) if bottom else None
    numbers = []
    for part in re.split(r"\s*/\s*", text, maxsplit=1):
        if not NUMBER.fullmatch(part):
            return None
        numbers.append(Fraction(part.replace(",", "").rstrip(".")))
    if len(numbers) == 1:
        return numbers[0]
    return numbers[0] / numbers[1] if numbers[1] else None


def read(tokens: tuple[str, ...]) -> Answer:
    """The form of an answer.

    Raises:
        UnreadableError: it has none.
    """
    items = [_read_item(piece) for piece in _split(tokens, {",", ";", "and", "or"}) if piece]
    if not items:
        raise UnreadableError("nothing here")
    return items[0] if len(items) == 1 else Answer("list", _flat(items))


def _read_item(tokens: tuple[str, ...]) -> Answer:
    if not tokens:
        raise UnreadableError("nothing here")
    parts, united = _split(tokens, RELATIONS), _split(tokens, {r"\cup"})
    if len(parts) > 1:
        return _read_relation(parts, [sign for sign, depth in _depths(tokens) if depth == 0 and sign in RELATIONS])
    if tokens == (r"\mathbb", "{", "R", "}"):
        return read(("(", "-", r"\infty", ",", r"\infty", ")"))
    if DATE.fullmatch("".join(tokens)):
        return Answer("date", tokens=tuple(token.lstrip("0") for token in tokens))
    if len(united) > 1:
        return Answer(r"\cup", tuple(map(_read_item, united)))
    if r"\begin" in tokens:
        return _read_matrix(tokens)
    if tokens[0] in OPENING and [depth for _, depth in _depths(tokens[:-1])].count(0) == 0 and tokens[-1] in CLOSING:
        return _read_group(tokens)
    if tokens.count(r"\pm") == 1:
        both = (tuple(sign if token == r"\pm" else token for token in tokens) for sign in "+-")
        return Answer("list", tuple(map(_read_item, both)))
    value, unit = split_unit(tokens)
    ratio = _split(value, {":"})
    if len(ratio) > 1 and all(ratio):
        return Answer(":", tuple(Answer("value", tokens=part) for part in ratio), unit=unit)
    if any(map(is_word, value)) and all(re.fullmatch(r"\w+|[-.'\"!?]", token) for token in value):
        return Answer("words", tokens=tuple(token.lower() for token in value if token.isalnum()), unit=unit)
    return Answer("value", tokens=value, unit=unit)


def _read_group(tokens: tuple[str, ...]) -> Answer:
    """`(1, 2)`, `[1, 2)`, `\\{1, 2\\}`; brackets around one thing are that thing."""
    kind = (tokens[0] + tokens[-1]).replace("\\", "")
    pieces = _split(tokens[1:-1], {",", ";"})
    if len(pieces) == 1 and tokens[0] != r"\{":
        return read(tokens[1:-1])
    items = [_read_item(piece) for piece in pieces if piece or kind != "{}"]
    if kind == "[]" and all(item.kind == "[]" for item in items):
        return Answer("matrix", tuple(replace(item, kind="row") for item in items))
    return Answer(kind, _flat(items) if kind == "{}" else tuple(items))


def _read_matrix(tokens: tuple[str, ...]) -> Answer:
    r"""`\frac12\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}`: what stands before multiplies every entry."""
    start = tokens.index(r"\begin")
    before, body, kind = tokens[:start], tokens[start + 4 : -4], "".join(tokens[start + 2 : start + 3])
    if kind == "array" and "}" in body:  # \left[\begin{array}{cc} 1 & 2 \end{array}\right]
        before, body, tokens = before[:-1], body[body.index("}") + 1 : -1], tokens[:-1]
    if kind not in ("matrix", "pmatrix", "bmatrix", "array") or tokens[-4:] != (r"\end", "{", kind, "}"):
        raise UnreadableError(f"{kind} is no matrix")
    factor = (*before, "1", "*") if before == ("-",) else (*before, "*") if before else ()
    table = [_split(row, {"&"}) for row in _split(body, {"\\\\"}) if row]
    rows = [tuple(Answer("value", tokens=(*factor, "(", *entry, ")")) for entry in row) for row in table]
    return Answer("matrix", tuple(Answer("row", row) for row in rows))


def _read_relation(parts: list[tuple[str, ...]], signs: list[str]) -> Answer:
    if not all(parts):
        raise UnreadableError("nothing on one side")
    if r"\approx" in signs:  # the exact value comes first
        parts, signs = parts[: signs.index(r"\approx") + 1], signs[: signs.index(r"\approx")]
        return _read_relation(parts, signs) if signs else _read_item(parts[0])
    left, right = parts[0], parts[-1]
    if len(parts) == 2 and signs[0] in ("=", r"\in"):
        if _is_name(left):
            return replace(_read_item(right), name="".join(left))
        if signs[0] == "=" and left[0] == "(":  # (x, y) = (1, 2)
            names, values = _split(left[1:-1], {","}), _read_item(right)
            if values.kind == "()" and len(names) == len(values.items) and all(map(_is_name, names)):
                items = zip(values.items, names, strict=True)
                return replace(values, items=tuple(replace(item, name="".join(name)) for item, name in items))
    if set(signs) == {"="}:
        points = sample(*parts[_is_name(left) :])
        if len(points) == 1:  # 3 \cdot 4 = 12
            sides, error = points[0]
            if not all(_agree(sides[0], side, error) for side in sides[1:]):
                raise UnreadableError("a false equation")
            return replace(_read_item(right), name="".join(left) if _is_name(left) else "")
    if all(sign in FLIPPED for sign in signs):
        parts, signs = parts[::-1], [FLIPPED[sign] for sign in signs[::-1]]
    return Answer("relation", tuple(Answer("value", tokens=part) for part in parts), tokens=tuple(signs))


def _same(gold: Answer, answer: Answer, ordered: bool) -> bool:
    if gold.unit and answer.unit and gold.unit != answer.unit:
        return False
    names = gold.name.lower(), answer.name.lower()
    if all(name.isalpha() for name in names) and names[0] != names[1]:
        return gold.kind == answer.kind == "value" and _same_relation(_equation(gold), _equation(answer))
    if "relation" in (gold.kind, answer.kind):
        gold, answer = _as_intervals(gold, answer), _as_intervals(answer, gold)
    elif {gold.kind, answer.kind} == {"list", r"\cup"}:
        gold, answer = (replace(side, kind=r"\cup", items=tuple(map(_interval, side.items))) for side in (gold, answer))
    if gold.kind != answer.kind:
        if {gold.kind, answer.kind} == {":", "value"}:
            return _equal(*(_joined(side.items, "/") if side.items else side.tokens for side in (gold, answer)))
        if {gold.kind, answer.kind} == {"list", "()"}:
            return (_distinct(gold.items) or _distinct(answer.items)) and _same_items(gold, answer, True)
        return {gold.kind, answer.kind} == LOOSE and _same_items(gold, answer, False)
    if gold.kind == "value":
        return _equal(gold.tokens, answer.tokens)
    if gold.kind == "relation":
        return _same_relation(gold, answer)
    if gold.kind == ":" and len(gold.items) == len(answer.items) == 2:
        clock = any(len(side.items[1].tokens[0]) == 2 for side in (gold, answer))
        if not clock and _equal(_joined(gold.items, "/"), _joined(answer.items, "/")):
            return True
    if gold.kind in ("words", "date"):
        return gold.tokens == answer.tokens
    loose = gold.kind in (*LOOSE, r"\cup") and not (ordered and gold.kind == "list")
    return _same_items(gold, answer, not loose)


def _same_items(gold: Answer, answer: Answer, ordered: bool) -> bool:
    """Items in order, or one to one in any order; items with names of their own by name."""
    if len(gold.items) != len(answer.items):
        return False
    others = list(answer.items)
    if _distinct(gold.items) and _distinct(answer.items):
        places = {item.name: item for item in others}
        if {item.name for item in gold.items} != set(places):
            return False
        others, ordered = [places[item.name] for item in gold.items], True
    if ordered:
        sides = [_by_letter(items) for items in (gold.items, tuple(others))]
        return all(_same(item, other, False) for item, other in zip(*sides, strict=True))
    for item in gold.items:
        twin = next((other for other in others if _same(item, other, False)), None)
        if twin is None:
            return False
        others.remove(twin)
    return True


def _same_relation(gold: Answer, answer: Answer) -> bool:
    """The same signs, and sides whose differences are multiples of each other: `x + y = 1` and `2y = 2 - 2x`."""
    if gold.tokens != answer.tokens:
        return False
    for at, sign in enumerate(gold.tokens):
        points = sample(*(_joined(side.items[at : at + 2], "-") for side in (gold, answer)))
        (first, other), error = points[0]
        if len(points) == 1 or not abs(first) > error or not abs(other) > error:
            return False
        if sign in ("<", r"\le") and not (first / other).real > 0:
            return False
        if not all(_agree(one * other, two * first, error * (abs(first) + abs(other))) for (one, two), error in points):
            return False
    return True


def _as_intervals(side: Answer, other: Answer) -> Answer:
    r"""`side` in the form of `other`: a relation as an interval, `y = 2x` as an equation."""
    if side.kind == "relation" and other.kind in INTERVALS:
        return _interval(side)
    return _equation(side) if side.kind == "value" and side.name and other.tokens == ("=",) else side


def _equation(named: Answer) -> Answer:
    return Answer("relation", (Answer("value", tokens=tokenise(named.name)), replace(named, name="")), ("=",))


def _interval(relation: Answer) -> Answer:
    r"""`1 \le x < 2` as `[1, 2)`, `x > 3` as `(3, \infty)`; anything else as it is."""
    parts, signs = relation.items, relation.tokens
    if relation.kind != "relation" or not set(signs) <= {"<", r"\le"}:
        return relation
    if len(parts) == 2 and _is_name(parts[0].tokens):
        parts, signs = (Answer("value", tokens=("-", r"\infty")), *parts), ("<", *signs)
    elif len(parts) == 2:
        parts, signs = (*parts, Answer("value", tokens=(r"\infty",))), (*signs, "<")
    if len(parts) != 3 or not _is_name(parts[1].tokens):
        return relation
    kind = ("(" if signs[0] == "<" else "[") + (")" if signs[1] == "<" else "]")
    return Answer(kind, (parts[0], parts[2]), name="".join(parts[1].tokens))


def _equal(gold: tuple[str, ...], answer: tuple[str, ...]) -> bool:
    """Two expressions have the same value, or one to six decimals when one is a decimal fraction."""
    if gold == answer:
        return True
    points = sample(gold, answer)
    if all(_agree(one, other, error) for (one, other), error in points):
        return True
    decimal = any(token[-1].isdigit() and not token.isdigit() for token in (*gold, *answer))
    return len(points) == 1 and decimal and _close(*points[0][0])


def _agree(one: Number, other: Number, error: Number) -> bool:
    return bool(one == other if isinstance(one, Fraction) else abs(one - other) <= error)


def _close(gold: Number, answer: Number) -> bool:
    if gold == answer:
        return True
    if getattr(gold, "denominator", 0) == 1 and getattr(answer, "denominator", 0) == 1:
        return False
    gap = abs(gold - answer)
    return bool(gap * 10**7 <= 5 and gap * 10**6 <= 2 * max(abs(gold), abs(answer)))


def _joined(items: tuple[Answer, ...], sign: str) -> tuple[str, ...]:
    if len(items) != 2:
        raise UnreadableError("a ratio of more than two")
    return ("(", *items[0].tokens, ")", sign, "(", *items[1].tokens, ")")


def _distinct(items: tuple[Answer, ...]) -> bool:
    names = {item.name for item in items}
    return len(names) == len(items) > 1 and "" not in names


def _by_letter(items: tuple[Answer, ...]) -> list[Answer]:
    """`y = 2, x = 1` in the order of the point `(1, 2)`."""
    return sorted(items, key=lambda item: item.name if all(len(other.name) == 1 for other in items) else "")


def _flat(items: list[Answer]) -> tuple[Answer, ...]:
    return tuple(part for item in items for part in (item.items if item.kind == "list" else (item,)))


def _is_name(tokens: tuple[str, ...]) -> bool:
    text = "".join(tokens)
    return NAME.fullmatch(text) is not None and text not in ("e", "i", r"\pi", r"\infty")


def _depths(tokens: tuple[str, ...]) -> list[tuple[str, int]]:
    """Each token with the number of brackets open after it."""
    depths, depth = [], 0
    for token in tokens:
        depth += (token in OPENING) - (token in CLOSING)
        depths.append((token, depth))
    return depths


def _split(tokens: tuple[str, ...], separators: set[str]) -> list[tuple[str, ...]]:
    """`tokens` cut at the separators outside brackets."""
    pieces, start = [], 0
    for at, (token, depth) in enumerate(_depths(tokens)):
        if depth == 0 and token in separators:
            pieces.append(tokens[start:at])
            start = at + 1
    return [*pieces, tokens[start:]]
