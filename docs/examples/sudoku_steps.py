"""A process reward: a Sudoku is judged at every denoising step, by the cells that the step has decided.

A cell is wrong when it differs from its given, or when its digit stands already in its row, column or box, among the
givens and the cells decided up to and with its step. Of two equal digits that are decided in one step, both are wrong.
A step gives minus `penalty` for each such cell; the last step gives 1 more for a right grid. `steps: false` hands out
the sum at the end instead, so that the same reward can be had with and without a value model.
docs/experiments/value_model.md has the comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards.score import Score
from rewards.sudoku import share_unit, sudoku


def sudoku_steps(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    puzzle: Sequence[str],
    reveal_steps: Sequence[Sequence[int]],
    num_steps: Sequence[int],
    penalty: float = 0.1,
    steps: bool = True,
    **columns: Any,
) -> list[Score]:
    """Score 4x4 grids of 16 digits.

    Args:
        puzzle: the givens, 16 characters row by row, 0 for a blank.
        reveal_steps: of each completion, the step in 0..T-1 that decided each cell.
        num_steps: T of each completion.

    Returns:
        The sum of the steps' values as `value`, and the values as `steps` if asked.
    """
    final = sudoku(prompts, completions, puzzle)
    scores = []
    for verdict, clue, answer, when, count in zip(final, puzzle, completions, reveal_steps, num_steps, strict=True):
        values = [0.0] * count
        wrong = wrong_cells(clue, answer, when)
        for cell in wrong:
            values[when[cell]] -= penalty
        values[-1] += verdict.value or 0.0
        metrics = {"wrong_cells": float(len(wrong))}
        scores.append(Score(sum(values), steps=values if steps else None, metrics=metrics))
    return scores


def wrong_cells(clue: str, answer: str, when: Sequence[int]) -> list[int]:
    """The cells 0..15 that were wrong at the step that decided them.

    Example: the answer "11" of a row without givens, decided in steps 0 and 1: cell 1 is wrong; both in step 0: both.
    """
    wrong = []
    for cell, digit in enumerate(answer[:16]):
        known = {other: clue[other] for other in range(16) if clue[other] != "0"}
        known |= {other: answer[other] for other in range(len(answer[:16])) if when[other] <= when[cell]}
        near = (other for other in known if other != cell and share_unit(cell, other, 4))
        if clue[cell] not in ("0", digit) or any(known[other] == digit for other in near):
            wrong.append(cell)
    return wrong
