"""Experts, who say what a draft should have been (`algorithm.expert` of the recipe rediff)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rewards.address import load_address
from rl.tasks.base import Example, reward_columns

_NAMES = {"answer": "rl.tasks.experts:own_answer", "sudoku": "rewards.sudoku:corrected"}


def expert_of(name: str) -> Callable[..., Sequence[str | None]]:
    """The function of (prompts, completions, **columns) that a name or an address stands for.

    Raises:
        ValueError: there is none.
    """
    found: Callable[..., Sequence[str | None]] = load_address(_NAMES.get(name, name), f"algorithm.expert {name!r}")
    return found


def own_answer(
    prompts: Sequence[Any], completions: Sequence[str], answer: Sequence[str] | None = None, **columns: Any
) -> Sequence[str | None]:
    """The column `answer`, whatever the draft is."""
    if answer is None:
        raise ValueError("algorithm.expert answer takes the column answer, and the rows have none: name another expert")
    return answer


def expert_texts(name: str, examples: Sequence[Example], completions: Sequence[str]) -> list[str | None]:
    """What each completion should be, None where the expert does not know.

    Raises:
        ValueError: the expert gives something else, or another number of texts.
    """
    prompts = [example["prompt"] for example in examples]
    texts = expert_of(name)(prompts, list(completions), **reward_columns(examples))
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise ValueError(f"algorithm.expert {name!r} gave a {type(texts).__name__}, not a list of texts")
    for row, text in enumerate(texts):
        if not (text is None or isinstance(text, str)):
            raise ValueError(
                f"algorithm.expert {name!r} gave a {type(text).__name__} for draft {row}, not a text or None"
            )
    if len(texts) != len(completions):
        raise ValueError(
            f"algorithm.expert {name!r} gave {len(texts)} texts for {len(completions)} drafts, not as many"
        )
    return list(texts)
