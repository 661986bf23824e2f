"""Instructions whose following a program can check, in the style of IFEval (Zhou et al. 2023, arXiv 2311.07911)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from rewards.keywords import words_of
from rewards.score import Score
from rewards.text import text_of

# kind -> the sentence that asks for it, and whether a text with an argument does it.
CONSTRAINTS: dict[str, tuple[str, Callable[[str, Any], bool]]] = {
    "at_most": ("Use at most {} words.", lambda text, n: 0 < len(words_of(text)) <= n),
    "at_least": ("Use at least {} words.", lambda text, n: len(words_of(text)) >= n),
    "sentences": ("Write exactly {} sentences.", lambda text, n: len(re.findall(r"[^.!?]*\w[^.!?]*[.!?]+", text)) == n),
    "word": ('Use the word "{}".', lambda text, word: word in words_of(text)),
    "without_letter": ('Do not use the letter "{}".', lambda text, a: bool(text.strip()) and a not in text.lower()),
    "first_word": ('Begin with the word "{}".', lambda text, word: words_of(text)[:1] == [word]),
    "last_word": ('End with the word "{}".', lambda text, word: words_of(text)[-1:] == [word]),
    "case": (
        "Write everything in {} letters.",
        lambda text, case: (text.isupper if case == "capital" else text.islower)(),
    ),
    "lines": (
        "Write exactly {} lines.",
        lambda text, n: len([line for line in text.splitlines() if line.strip()]) == n,
    ),
}


def instructions(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    constraints: Sequence[Sequence[Sequence[Any]]],
    partial: bool = False,
    **columns: Any,
) -> list[Score]:
    """1.0 when a completion follows all instructions of its row, else 0.0.

    Args:
        constraints: kind (of `CONSTRAINTS`) and argument of every instruction, `[["at_most", 12], ["word", "sea"]]`.
        partial: give the share that is followed instead.

    Metric: `followed`, that share. A kind that there is not gives no score.
    """
    scores = []
    for text, wanted in zip(completions, constraints, strict=True):
        unknown = [kind for kind, _ in wanted if kind not in CONSTRAINTS]
        if unknown or not wanted:
            scores.append(Score(None, reason=f"constraints must be some of {', '.join(CONSTRAINTS)}, got {unknown}"))
            continue
        done = [CONSTRAINTS[kind][1](text_of(text), argument) for kind, argument in wanted]
        share = sum(done) / len(done)
        scores.append(Score(share if partial else float(share == 1), metrics={"followed": share}))
    return scores
