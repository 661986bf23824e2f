r"""Final answers of mathematics problems: GSM8K (`#### 72`), MATH (`\boxed{\frac12}`), and plain ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rewards.math_equal import is_readable, math_equal, number_of
from rewards.math_text import CLAUSE
from rewards.score import Score
from rewards.text import answer_part, boxes, last_boxed, text_of

ANCHORS = ("boxed", "hash", "any")
SAID = re.compile(
    r"(?:^A|answers?|答案)[\s*]{0,4}(?::|\uff1a|is|are|=|是|为)[\s*:\uff1a]{0,8}(\\\[[\s\S]{0,500}?\\\]|\$\$[^$]{1,500}\$\$|.+)",
    re.IGNORECASE | re.MULTILINE,
)
NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
LAST_NUMBER = re.compile(rf"-?(?:\d+ \d+/\d+|{NUMBER}(?:/\d+)?)")
LEAD = re.compile(
    r"(?:(?:the|an?|number|total|value|sum|result|of|is|equal|equals|to|simply|therefore|option|choice)\s+)+",
    re.IGNORECASE,
)
BETWEEN_BOXES = re.compile(
    r"[\s$.)\\\]]*(?:,|;|and|or)[\s$(\\\[]*(?:and|or)?[\s$]*(?:[a-z]\s*=\s*)?\\f?box(?:ed)?\s*\{"
)
MAX_CHARACTERS = 500


class MathAnswer:
    r"""1.0 when the completion's final answer equals the reference in the column `answer`, else 0.0.

    The reference is an answer, or a whole solution that ends in `#### 72` or holds a `\boxed{}`. A row without one
    is not applicable. An answer that cannot be read, or computed in bounded time, is wrong. Metric: `answered`.

    Args:
        anchor: where the answer is looked for. "any": the last `\boxed{}`, else what follows the last `####`, else
            the last `Answer: ...` / `the answer is ...` / `A: ...`, else the last number. "boxed" and "hash" accept
            only that form and make everything else wrong.
        ordered: compare lists such as `1, -2` in order.
        verdict_seconds: read by nothing; older configs set it.

    Raises:
        ValueError: for an unknown anchor.
    """

    __name__ = "math_answer"

    def __init__(self, anchor: str = "any", ordered: bool = False, verdict_seconds: float = 0.0) -> None:
        if anchor not in ANCHORS:
            raise ValueError(f"reward 'math_answer': anchor must be one of {', '.join(ANCHORS)}, got '{anchor}'")
        self.anchor = anchor
        self.ordered = ordered

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], answer: Sequence[Any], **columns: Any
    ) -> list[Score]:
        return [self._score_one(text_of(text), gold) for text, gold in zip(completions, answer, strict=True)]

    def _score_one(self, completion: str, reference: Any) -> Score:
        gold = None if reference is None else reference_answer(str(reference))
        if not gold:
            return Score(None, reason="no reference answer", applicable=False)
        found = final_answer(completion, self.anchor)
        if found is None or len(found) > MAX_CHARACTERS:
            return Score(0.0, metrics={"answered": 0.0})
        right = math_equal(gold, found, self.ordered)
        if not right and self.anchor != "hash":
            listed = boxed_list(answer_part(completion))
            right = listed is not None and len(listed) <= MAX_CHARACTERS and math_equal(gold, listed, self.ordered)
        return Score(float(right), metrics={"answered": 1.0})


def reference_answer(reference: str) -> str:
    r"""The answer inside a reference: after the last `####`, inside the last `\boxed{}`, or all of it."""
    if "####" in reference:
        return reference.rpartition("####")[2].strip()
    boxed = last_boxed(reference)
    return reference.strip() if boxed is None else boxed.strip()


def final_answer(completion: str, anchor: str = "any") -> str | None:
    """The final answer a completion gives (see `math_answer`), None when it gives none."""
    text = answer_part(completion)
    if anchor == "boxed":
        return (last_boxed(text) or "").strip() or None
    found = boxes(text) if anchor == "any" else []
    if found:
        start, end = found[-1]
        boxed = text[start:end] if end is not None else text[start:].split("\n", 1)[0]  # never closed
        return boxed.strip() or None
    if "####" in text:
        return text.rpartition("####")[2].strip().split("\n")[0].strip() or None
    if anchor == "hash":
        return None
    said = SAID.findall(text)
    if said:
        return _sentence(said[-1][: 2 * MAX_CHARACTERS])
    tagged, line = text != completion, text.strip()
    if tagged and len(line) > MAX_CHARACTERS:
        return line
    plain = _sentence(line) if tagged or ("\n" not in line and len(line) <= MAX_CHARACTERS) else None
    if plain is not None and (tagged or not LAST_NUMBER.search(plain) or is_readable(plain)):
        return plain
    numbers = LAST_NUMBER.findall(text)
    return numbers[-1] if numbers else None


def boxed_list(text: str) -> str | None:
    r"""`1, 2` of a text that ends in `\boxed{1} and \boxed{2}`; None where one box stands alone."""
    contents: list[str] = []
    later = None
    for start, end in reversed(boxes(text)):
        if end is None or (later is not None and not BETWEEN_BOXES.fullmatch(text, end + 1, later)):
            break
        contents.insert(0, text[start:end])
        later = start
    return ", ".join(contents) if len(contents) > 1 else None


def _sentence(said: str) -> str | None:
    """An answer out of running text: `12` of "the number 12, since 7 + 5 = 12."; "12 apples" stays."""
    text = re.sub(r"\.\s[\s\S]*$|\.$", "", said.replace("**", "").strip())
    text = LEAD.sub("", CLAUSE.sub("", text), count=1) if LEAD.match(text) else CLAUSE.sub("", text)
    if number_of(text) is None and " " in text.strip() and not is_readable(text):
        dollars = re.findall(r"\$([^$]+)\$|\\\((.+?)\\\)", said)
        first = re.match(rf"[$\\]*(-?{NUMBER}) (?:[A-Za-z]{{3,}}|\(|- ?[A-Za-z])", text)
        text = "".join(dollars[-1]) if dollars else first.group(1) if first else text
    return text.strip().strip("$").strip() or None
