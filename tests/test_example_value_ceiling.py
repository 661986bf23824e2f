"""docs/examples/value_ceiling.py on three rollouts by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from docs.examples.value_ceiling import main
from rollouts.trajectory import TokenTrajectory, save_trajectories

RIGHT = "1234341221434321"
PUZZLE = "00" + RIGHT[2:]
MASK = 9


def rollout(first: str, second: str) -> TokenTrajectory:
    """All cells but the second are decided in step 0, the second in step 1; a digit's id is the digit."""
    tokens = np.array([int(digit) for digit in first + RIGHT[2:] + second])
    return TokenTrajectory(
        prompt_ids=np.array([int(digit) for digit in PUZZLE]),
        length=32,
        mask_token_id=MASK,
        num_steps=2,
        step=np.array([0] * 15 + [1]),
        position=np.array([16, *range(18, 32), 17]),
        token=tokens,
        logprob=np.zeros(16),
        confidence=np.ones(16),
        stop_length=16,
    )


def test_the_share_that_a_critic_could_know_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Right; still possible before step 1, and wrong; dead before step 1.
    drawn, rewards = [("1", "2"), ("1", "3"), ("2", "1")], [1.0, 0.0, 0.0]
    save_trajectories(tmp_path / "trajectories.npz", [rollout(*pair) for pair in drawn])
    rows = [json.dumps({"prompt": PUZZLE, "reward": reward}) for reward in rewards]
    (tmp_path / "rollouts.jsonl").write_text("\n".join(rows) + "\n")
    main(tmp_path)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # Around their mean: 2/3, -1/3, -1/3, of variance 2/9. The mean of the living, 1/6, leaves 1/6.
    assert lines[1] == ["0", "0.000", "0.333", "0.000"]
    assert lines[2] == ["1", "0.333", "0.500", "0.250"]
    # One token of sixteen is decided in step 1.
    assert lines[3][-1] == f"{0.25 / 16:.3f}"
