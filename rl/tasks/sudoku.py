"""Sudoku, 4x4: a puzzle a diffusion model solves cell by cell and gets wrong in parallel.

Puzzles keep a random few cells of a random grid, so many have several valid completions. Deciding cells
independently mixes completions; that is what RL on the denoising trajectory repairs.
"""

from __future__ import annotations

import itertools
import random
from functools import cache

from rl.tasks import templates
from rl.tasks.base import Example, split_of
from rl.tasks.drawn import DrawnTask
from rl.tasks.records import read_records


@cache
def all_grids() -> list[str]:
    """The 288 complete 4x4 grids as strings of 16 digits."""
    rows = list(itertools.permutations("1234"))
    grids = []
    for grid in itertools.product(rows, repeat=4):
        columns = zip(*grid, strict=True)
        boxes = ((grid[r][c], grid[r][c + 1], grid[r + 1][c], grid[r + 1][c + 1]) for r in (0, 2) for c in (0, 2))
        if all(len(set(unit)) == 4 for unit in itertools.chain(columns, boxes)):
            grids.append("".join(itertools.chain(*grid)))
    return grids


def is_heldout(puzzle: str) -> bool:
    """One puzzle in eight, by its own text: whoever draws it, whenever, training leaves it out."""
    return split_of(puzzle) != "train"


class SudokuTask(DrawnTask):
    """Random 4x4 puzzles; prompt `0340...=`, response the 16 digits of a completion."""

    reward = "sudoku"
    grid = (4, 4)
    alphabet = "01234="
    templates = templates.SUDOKU

    def __init__(self, min_givens: int = 4, max_givens: int = 8):
        """
        Args:
            min_givens, max_givens: cells kept of a grid, drawn uniformly from this range.
        """
        if not 0 <= min_givens <= max_givens <= 16:
            raise ValueError(f"task.params needs 0 <= min_givens <= max_givens <= 16, got {min_givens}, {max_givens}")
        self.min_givens = min_givens
        self.max_givens = max_givens

    def file_examples(self, path: str) -> list[Example]:
        """Puzzles of a CSV file with a column `Puzzle` (16 digits, 0 = empty)."""
        records = read_records(path)
        if "Puzzle" not in records[0]:
            raise ValueError(f"{path}: a Sudoku file has a column Puzzle; this one has {', '.join(records[0])}")
        puzzles = [str(record["Puzzle"]).strip() for record in records]
        for number, puzzle in enumerate(puzzles, start=1):
            if len(puzzle) != 16 or set(puzzle) - set("01234"):
                raise ValueError(f"{path}: row {number}: column Puzzle must be 16 digits 0 to 4, got {puzzle!r}")
        return [{"prompt": puzzle + "=", "puzzle": puzzle} for puzzle in puzzles]

    def _propose(self, rng: random.Random) -> tuple[str, tuple[str, str]]:
        answer = rng.choice(all_grids())
        kept = set(rng.sample(range(16), rng.randint(self.min_givens, self.max_givens)))
        puzzle = "".join(cell if i in kept else "0" for i, cell in enumerate(answer))
        return puzzle, (puzzle, answer)

    def _shown(self, problem: tuple[str, str], rng: random.Random) -> Example:
        puzzle, answer = problem
        return {"prompt": puzzle + "=", "puzzle": puzzle, "answer": answer}

    def _used_up(self, found: int, count: int, split: str) -> None:
        raise ValueError(
            f"task.params min_givens {self.min_givens} and max_givens {self.max_givens} leave only {found} {split} "
            f"puzzles where {count} are asked for: widen their range, or ask for fewer"
        )
