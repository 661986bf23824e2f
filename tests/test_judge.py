"""rl/train/judge.py: the verdicts on the rollouts of a step, a prompt's together."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from rl.sections import RewardConfig
from rl.tasks.sudoku import SudokuTask
from rl.train.judge import Judge

REWARD = "def number(prompts, completions, **columns):\n    return [float(text) for text in completions]\n"


def test_rewards_that_are_normalised_by_group_see_the_groups_of_prompts(tmp_path: Path) -> None:
    """Also where all prompts are one text. Two values are 1/sqrt(2) standard deviations off their mean."""
    (tmp_path / "own.py").write_text(REWARD)
    part = {"name": f"{tmp_path / 'own.py'}:number", "normalize": "group"}
    modality = SimpleNamespace(finished=lambda trajectories: (trajectories, {}))
    judge = Judge(RewardConfig(functions=[part]), SudokuTask(), modality)
    try:
        completions, table = judge.score([{"prompt": "same"}] * 4, ["1", "3", "100", "700"], group_size=2)
    finally:
        judge.close()
    assert completions == ["1", "3", "100", "700"]
    half = 0.5**0.5
    assert table.values == pytest.approx([-half, half, -half, half], rel=1e-3)
