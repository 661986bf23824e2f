"""How much of the reward a critic could know before a step: 4x4 Sudoku, where a canvas can be judged by enumeration.

    denoise-rl rollout --config quickstart model.path=MODEL --num-prompts 128 --group-size 16 --output FOLDER
    python docs/examples/value_ceiling.py FOLDER

A canvas is dead when no right grid has its digits: the reward is 0, whatever follows. Before each step this prints the
share of dead canvases, the mean reward of the others, and how much of the reward's variance within a puzzle the number
of right grids that a canvas leaves explains, which is what a critic would have to find out.
docs/experiments/value_model.md has the numbers.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import numpy as np

from rewards.sudoku import solutions
from rollouts.trajectory import TokenTrajectory, load_trajectories


def explained(outcome: np.ndarray, key: np.ndarray, weight: np.ndarray) -> float:
    """Share of an outcome's variance that is explained by its mean for each key; all [N], weighted."""
    predicted = np.zeros_like(outcome)
    for value in np.unique(key):
        rows = key == value
        predicted[rows] = np.average(outcome[rows], weights=weight[rows])
    mean = np.average(outcome, weights=weight)
    return float(
        1 - np.average((outcome - predicted) ** 2, weights=weight) / np.average((outcome - mean) ** 2, weights=weight)
    )


def grids_left(trajectory: TokenTrajectory, step: int, clues: str, digit_of: dict[int, str]) -> int:
    """How many right grids have the givens and the digits decided before `step`."""
    canvas = trajectory.canvas_at(step)[trajectory.prompt_length :]
    cells = ["0" if token == trajectory.mask_token_id else digit_of.get(int(token), "x") for token in canvas]
    both = [clue if cell == "0" else cell for cell, clue in zip(cells, clues, strict=True)]
    if "x" in both or any(cell != clue for cell, clue in zip(both, clues, strict=True) if clue != "0"):
        return 0
    return len(list(solutions("".join(both))))


def main(folder: Path) -> None:
    with (folder / "rollouts.jsonl").open() as file:
        rows = [json.loads(line) for line in file]
    trajectories = load_trajectories(folder / "trajectories.npz")
    # The ids of the digits, from the prompts.
    digit_of = {}
    for row, trajectory in zip(rows, trajectories, strict=True):
        digit_of |= {int(i): c for i, c in zip(trajectory.prompt_ids, row["prompt"], strict=True) if c in "1234"}
    groups = defaultdict(list)
    for row in rows:
        groups[row["prompt"]].append(row["reward"])
    table = []
    for row, trajectory in zip(rows, trajectories, strict=True):
        centred = row["reward"] - fmean(groups[row["prompt"]])
        for step in range(trajectory.num_steps):
            left = grids_left(trajectory, step, row["prompt"][:16], digit_of)
            table.append((step, left, row["reward"], centred, int((trajectory.step == step).sum())))
    step, left, reward, centred, tokens = np.array(table, dtype=float).T
    print("before step   dead   reward of the others   explained")
    for number in np.unique(step):
        here = step == number
        share = explained(centred[here], left[here], tokens[here])
        alive = reward[here & (left > 0)].mean()
        print(f"{int(number):11}   {(left[here] == 0).mean():.3f}   {alive:20.3f}   {share:9.3f}")
    print(f"over all decisions: {explained(centred, 1000 * step + left, tokens):.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
