r"""Integrals, sums, limits, floors, set operations, matrix products: computed by math-verify, within bounds.

Its timeout is a signal, so it is asked in the main thread of a reward process only (`mode: process`); elsewhere such an
answer equals only itself. No signal interrupts one huge power inside Python: texts that may hold one are refused.
"""

from __future__ import annotations

import logging
import os
import re
import threading

from rewards.child import TOKEN_VARIABLE

FORM = re.compile(
    r"\\(?:i?int|sum|prod|lim|lfloor|lceil|cap|setminus|gcd|max|min|det|partial) |\{ vmatrix|\\frac \{ d \} \{ d"
    r"|\\end \{ .?matrix \} .*\\begin"
)
TOKEN = re.compile(r"\d{1,4}|\d{0,3}\.\d{1,6}|[A-Za-z]|[pbv]?matrix|[-+*/^_!&(){}\[\]|,=<>]|\\[\\{}|]|\\[a-z]{2,9}")
LONG = re.compile(r"\d{1,9}(?:\.\d{1,9})?")
NUMBER_POWER = r"\^ (?:\d{1,2} |\{ (?:- )?\d{1,2} \} |\{ (?:- )?\\infty \} |\\infty )"
LETTER_POWER = r"\^ (?:[a-z] |\{ (?:- )?(?:\d )?[a-z] (?:[-+] \d )?\} )|(?<=e )\^ \{ - [a-z] \^ 2 \} "
BOUND = r"_ (?:\w |\{ [^{}^]* \} )\^ (?:(?:\d{1,4}|\\infty) |\{ (?:\d{1,4}|\\infty) \} )"
GROWING = re.compile(r"[)}\]!] !|\\(?:binom|underbrace|text)")
MAX_TOKENS, MAX_FORMS, SECONDS = 80, 3, 3


def same_forms(gold: tuple[str, ...], answer: tuple[str, ...]) -> bool:
    """True when one side has such a form and math-verify finds both equal within `SECONDS`.

    Args:
        gold, answer: tokens of either side, see `math_text.tokenise`.
    """
    texts = [" ".join(tokens) + " " for tokens in (gold, answer)]
    if not any(map(FORM.search, texts)) or not all(map(_is_small, texts)):
        return False
    if TOKEN_VARIABLE not in os.environ or threading.current_thread() is not threading.main_thread():
        return False
    if all("=" in re.sub(r"\{[^{}]*\}", "", text) for text in texts):  # names on both sides, which it would drop
        return False
    from math_verify.errors import TimeoutException  # with sympy: most answers need neither
    from math_verify.utils import timeout

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    try:
        return bool(timeout(SECONDS)(_compare)(*texts))
    except (Exception, TimeoutException):  # whatever a computer algebra system has against the text
        return False


def _compare(gold: str, answer: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import FiniteSet

    sides = []
    for text in (gold, answer):
        text = re.sub(r"\\(begin|end) \{ (.?matrix) \}", r"\\\1{\2}", text)
        text = re.sub(r"(?<![A-Za-z\\])d ([a-z]) ", r"d\1 ", text)  # `d t` would be a unit to it
        found = parse(f"${text}$", [LatexExtractionConfig()], parsing_timeout=None)
        if not found or isinstance(found[0], str) or found[1].replace(" ", "") != text.replace(" ", ""):
            return False  # nothing, or a part
        sides.append(found[0].doit())
    alike = isinstance(sides[0], FiniteSet) == isinstance(sides[1], FiniteSet)  # (2, 3) equals {2, 3} to it
    return alike and verify(*sides, timeout_seconds=None)


def _is_small(text: str) -> bool:
    """Whether all powers and factorials in a text stay small, whatever the order of computing."""
    tokens, forms = text.split(), len(FORM.findall(text))
    if len(tokens) > MAX_TOKENS or forms > MAX_FORMS or GROWING.search(text):
        return False
    if not all(TOKEN.fullmatch(token) or (not forms and LONG.fullmatch(token)) for token in tokens):
        return False
    rest, letters = re.subn(LETTER_POWER, "", re.sub(BOUND, "", text))
    return "^" not in re.sub(NUMBER_POWER, "", rest) and len(re.findall(r"[)}\]] \^", rest)) <= (letters == 0)
