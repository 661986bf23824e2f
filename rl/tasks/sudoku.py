"""Sudoku, 4x4: a puzzle a diffusion model solves cell by cell and gets wrong in parallel.

Puzzles keep a random few cells of a random grid, so many have several valid completions. Deciding cells
independently mixes completions; that is what RL on the denoising trajectory repairs.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from functools import cache

from rl.tasks import templates
from rl.tasks.base import Example, split_of
from rl.tasks.drawn import DrawnTask
from rl.tasks.records import read_records

# The cells of every row, column and box.
UNITS = {
    **{f"row {r + 1}": [4 * r + c for c in range(4)] for r in range(4)},
    **{f"column {c + 1}": [4 * r + c for r in range(4)] for c in range(4)},
    **{f"box {b + 1}": [8 * (b // 2) + 2 * (b % 2) + i for i in (0, 1, 4, 5)] for b in range(4)},
}


@cache
def all_grids() -> list[str]:
    """The 288 complete 4x4 grids as strings of 16 digits."""
    rows = map("".join, itertools.permutations("1234"))
    others = list(UNITS.values())[4:]
    grids = map("".join, itertools.product(rows, repeat=4))
    return [grid for grid in grids if all(len({grid[cell] for cell in unit}) == 4 for unit in others)]


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

    def violations(self, example: Example, cells: Sequence[str]) -> list[tuple[str, list[int]]]:
        """The rules that a filled grid breaks, and the cells of each.

        Example: `[("3 twice in row 1", [0, 2]), ("given 4 changed to 1", [5])]`.
        """
        found = []
        for name, unit in UNITS.items():
            for digit in "1234":
                same = [cell for cell in unit if cells[cell] == digit]
                if len(same) > 1:
                    found.append((f"{digit} {('twice', '3 times', '4 times')[len(same) - 2]} in {name}", same))
        for cell, (given, text) in enumerate(zip(example["puzzle"], cells, strict=False)):
            if given not in ("0", text):
                found.append((f"given {given} changed to {text or 'nothing'}", [cell]))
            elif text not in ("1", "2", "3", "4"):
                found.append((f"{text or 'nothing'} is no digit from 1 to 4", [cell]))
        return found

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
