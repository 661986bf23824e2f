"""docs/examples/sudoku_steps.py: the cells that are wrong at their step by hand, and a run with a value model."""

from pathlib import Path

import pytest

from docs.examples.sudoku_steps import sudoku_steps, wrong_cells
from tests.runs import ROOT, cli, series, tiny_config

RIGHT = "1234341221434321"
CLUE = "1" + "0" * 15


@pytest.mark.parametrize(
    ("clue", "answer", "when", "wrong"),
    [
        (CLUE, RIGHT, [0] * 16, []),
        # A given that is not kept, and the equal digit beside it: decided later it alone sees both.
        ("2" + "0" * 15, "11", [0, 1], [0, 1]),
        ("0" * 16, "11", [0, 0], [0, 1]),
        ("0" * 16, "11", [1, 0], [0]),
        # Cells 0 and 5 share a box, 0 and 4 a column, 0 and 6 nothing.
        ("0" * 16, "1xxxxx1", [0] * 7, []),
        ("0" * 16, "1xxxx1", [0] * 6, [0, 5]),
        # A given stands against a cell though the answer has not come to it.
        ("0001" + "0" * 12, "1", [0], [0]),
    ],
)
def test_wrong_cells_by_hand(clue: str, answer: str, when: list[int], wrong: list[int]) -> None:
    answer = answer.replace("x", ".")
    found = wrong_cells(clue, answer, when)
    assert [cell for cell in found if answer[cell] != "."] == wrong


def test_values_of_the_steps_add_up_with_and_without_them() -> None:
    twice = [[0] * 8 + [1] * 8] * 2
    answers = [RIGHT, "11" + RIGHT[2:]]
    stepwise = sudoku_steps([""] * 2, answers, [CLUE] * 2, twice, [2, 2])
    # In step 0 cells 0 and 1 are equal; in step 1 cell 9 meets the 1 of cell 1 in its column.
    assert [score.steps for score in stepwise] == [[0.0, 1.0], [pytest.approx(-0.2), pytest.approx(-0.1)]]
    whole = sudoku_steps([""] * 2, answers, [CLUE] * 2, twice, [2, 2], steps=False)
    assert [score.steps for score in whole] == [None, None]
    assert [score.value for score in whole] == [score.value for score in stepwise] == [1.0, pytest.approx(-0.3)]


def test_a_value_model_learns_from_it(tmp_path: Path) -> None:
    reward = f"reward.functions=[{{name: {ROOT}/docs/examples/sudoku_steps.py:sudoku_steps}}]"
    arguments = tiny_config(tmp_path, reward, "algorithm.value={}", "train.steps=1")
    result = cli("train", *arguments)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    (wrong,) = series(run, "train", "reward/sudoku_steps/wrong_cells")
    (mean,), (value_loss,) = series(run, "train", "reward/mean"), series(run, "train", "value/loss")
    assert wrong > 1 and value_loss > 0 and mean == pytest.approx(-0.1 * wrong, abs=1e-9)
