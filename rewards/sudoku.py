"""Sudoku, 4x4 or 9x9, judged by the rules: every grid that keeps the givens and obeys them is right.

No stored answer is compared, so puzzles with several solutions are judged fairly.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections.abc import Iterator, Sequence
from typing import Any

from rewards.score import Score
from rewards.text import answer_part, text_of

BLANKS = str.maketrans("._", "00")


def sudoku(
    prompts: Sequence[Any], completions: Sequence[Any], puzzle: Sequence[str] | None = None, **columns: Any
) -> list[Score]:
    """1.0 when the completed grid keeps every given and each row, column and box holds each digit once, else 0.0.

    Args:
        prompts: read for the givens when there is no `puzzle` column: 16 (or 81) characters row by row, blanks
            as 0, `.` or `_`, white space and one closing `=` ignored. Example: `"0310200404001043="`.
        completions: the full grid, 16 (or 81) digits, white space ignored; inside the last `<answer>` tag if any.
        puzzle: the givens, one string per completion, same form.

    Returns:
        One `Score` per completion, with metrics `givens_kept` and `units_right` (share of rows, columns and
        boxes that are complete). A puzzle that cannot be read is a failed score, not a wrong answer.
    """
    givens = [text_of(prompt) for prompt in prompts] if puzzle is None else puzzle
    return [_score_one(clue, text_of(text)) for clue, text in zip(givens, completions, strict=True)]


def _clues(puzzle: str) -> str:
    return re.sub(r"\s", "", puzzle).removesuffix("=").translate(BLANKS)


def is_puzzle(clues: str) -> bool:
    return len(clues) in (16, 81) and re.fullmatch(f"[0-{math.isqrt(len(clues))}]+", clues) is not None


def _score_one(puzzle: str, completion: str) -> Score:
    clues = _clues(puzzle)
    size = math.isqrt(len(clues))
    box = math.isqrt(size)
    if not is_puzzle(clues):
        return Score(None, reason=f"not a 4x4 or 9x9 sudoku: {puzzle[:90]!r}; give the givens in the column `puzzle`")
    grid = re.sub(r"\s", "", answer_part(completion))
    if not re.fullmatch(f"[1-{size}]{{{size * size}}}", grid):
        return Score(0.0, metrics={"givens_kept": 0.0, "units_right": 0.0})

    kept = all(clue in ("0", cell) for clue, cell in zip(clues, grid, strict=True))
    rows = [grid[start : start + size] for start in range(0, size * size, size)]
    columns = [grid[start::size] for start in range(size)]
    boxes = [
        "".join(rows[top + line][left : left + box] for line in range(box))
        for top in range(0, size, box)
        for left in range(0, size, box)
    ]
    right = sum(len(set(unit)) == size for unit in rows + columns + boxes)
    metrics = {"givens_kept": float(kept), "units_right": right / (3 * size)}
    return Score(float(kept and right == 3 * size), metrics=metrics)


def corrected(
    prompts: Sequence[Any], completions: Sequence[Any], puzzle: Sequence[str] | None = None, **columns: Any
) -> list[str | None]:
    """An expert for `algorithm.expert`: the solution that agrees with the completion in most cells.

    Args:
        prompts, puzzle: as of `sudoku`.

    Returns:
        One grid per completion; None where the completion is no full grid, or the puzzle has no solution. Of many
        solutions the first `MOST_SOLUTIONS` are compared.
    """
    givens = [text_of(prompt) for prompt in prompts] if puzzle is None else puzzle
    return [
        _nearest(_clues(clue), re.sub(r"\s", "", text_of(text))) for clue, text in zip(givens, completions, strict=True)
    ]


MOST_SOLUTIONS = 1000


def _nearest(clues: str, draft: str) -> str | None:
    if len(draft) != len(clues) or not is_puzzle(clues):
        return None
    found = itertools.islice(solutions(clues), MOST_SOLUTIONS)
    return max(found, key=lambda grid: sum(map(operator.eq, grid, draft)), default=None)


def share_unit(a: int, b: int, size: int) -> bool:
    """Whether two cells of a grid of `size` rows are in one row, column or box."""
    box = math.isqrt(size)
    (row, column), (other_row, other_column) = divmod(a, size), divmod(b, size)
    boxes = (row // box, column // box), (other_row // box, other_column // box)
    return row == other_row or column == other_column or boxes[0] == boxes[1]


def solutions(grid: str) -> Iterator[str]:
    """Every way to fill the zeros of a grid, row by row, by the rules; nothing for a grid that breaks one."""
    size = math.isqrt(len(grid))
    options = {}
    for cell, digit in enumerate(grid):
        seen = {grid[other] for other in range(len(grid)) if other != cell and share_unit(cell, other, size)}
        if digit == "0":
            options[cell] = [str(d) for d in range(1, size + 1) if str(d) not in seen]
        elif digit in seen:
            return
    if not options:
        yield grid
        return
    cell = min(options, key=lambda c: len(options[c]))
    for digit in options[cell]:
        yield from solutions(grid[:cell] + digit + grid[cell + 1 :])
