"""Sudoku, 4x4 or 9x9, judged by the rules: every grid that keeps the givens and obeys them is right.

No stored answer is compared, so puzzles with several solutions are judged fairly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
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


def _score_one(puzzle: str, completion: str) -> Score:
    clues = re.sub(r"\s", "", puzzle).removesuffix("=").translate(BLANKS)
    size = math.isqrt(len(clues))
    box = math.isqrt(size)
    if len(clues) not in (16, 81) or not re.fullmatch(f"[0-{size}]+", clues):
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
