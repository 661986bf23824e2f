"""Tasks: the Sudoku generator against brute force, files, names, and the character tokenizer."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any, TypedDict

import pytest

from rewards.sudoku import sudoku
from rl.tasks.base import split_of, validation_examples
from rl.tasks.char_tokenizer import char_tokenizer
from rl.tasks.jsonl import JsonlTask
from rl.tasks.load import load_task
from rl.tasks.sudoku import SudokuTask, all_grids

# --- Sudoku -----------------------------------------------------------------------------------------------------------

# Every row, column and box as cell indices, written out and not computed as the code does.
UNITS = [
    [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15],
    [0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15],
    [0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15],
]  # fmt: skip


def obeys_the_rules(grid: str) -> bool:
    return all({grid[i] for i in unit} == set("1234") for unit in UNITS)


def solutions(puzzle: str) -> set[str]:
    """All completions by trying digits cell by cell."""
    found, open_ = set(), [puzzle]
    while open_:
        grid = open_.pop()
        if "0" not in grid:
            found.add(grid)
            continue
        cell = grid.index("0")
        seen = {grid[i] for unit in UNITS if cell in unit for i in unit}
        open_ += [grid[:cell] + digit + grid[cell + 1 :] for digit in "1234" if digit not in seen]
    return found


def test_there_are_288_grids() -> None:
    assert len(all_grids()) == len(set(all_grids())) == 288
    assert all(obeys_the_rules(grid) for grid in all_grids())
    assert solutions("0" * 16) == set(all_grids())


def test_a_row_is_a_puzzle_and_one_of_its_completions() -> None:
    rows = SudokuTask(min_givens=4, max_givens=8).train_examples(seed=0, step=0, count=300)
    givens = [16 - row["puzzle"].count("0") for row in rows]
    assert set(givens) == {4, 5, 6, 7, 8}
    for row in rows:
        assert row["prompt"] == row["puzzle"] + "="
        assert obeys_the_rules(row["answer"])
        assert all(given in ("0", cell) for given, cell in zip(row["puzzle"], row["answer"], strict=True))
    # The ambiguity that parallel decoding gets wrong.
    assert sum(len(solutions(row["puzzle"])) > 1 for row in rows) > 100


def test_training_never_draws_a_puzzle_of_another_split() -> None:
    task = SudokuTask()
    trained = {row["puzzle"] for seed in range(3) for step in range(200) for row in task.train_examples(seed, step, 32)}
    test = [row["puzzle"] for row in task.heldout_examples(2000)]
    validation = [row["puzzle"] for row in task.validation_examples(500)]
    assert len(trained) > 10_000
    assert len(set(test)) == 2000 and len(set(validation)) == 500, "evaluation puzzles must differ from each other"
    assert not trained & set(test) and not trained & set(validation) and not set(test) & set(validation)
    assert validation_examples(task, 3) == task.validation_examples(3)


def test_the_split_is_a_property_of_the_puzzle() -> None:
    splits = [split_of(str(i)) for i in range(8000)]
    # 1/16 each: 500 expected, standard deviation 21.7.
    assert 400 < splits.count("test") < 600 and 400 < splits.count("validation") < 600
    assert splits.count("train") == 8000 - splits.count("test") - splits.count("validation")
    # Fixed for all time: a figure measured yesterday is on the same puzzles today.
    assert [split_of(x) for x in ("0", "1", "22", "48", "61", "65")] == ["train"] * 2 + ["validation"] * 2 + [
        "test"
    ] * 2


def test_rows_are_a_function_of_seed_and_step() -> None:
    task = SudokuTask()
    assert task.train_examples(1, 5, 8) == SudokuTask().train_examples(1, 5, 8)
    assert task.train_examples(1, 5, 8) != task.train_examples(1, 6, 8) != task.train_examples(2, 6, 8)
    assert task.heldout_examples(8) == task.heldout_examples(20)[:8]


@pytest.mark.parametrize(("low", "high"), [(-1, 3), (5, 4), (3, 17)])
def test_givens_that_cannot_be_are_refused(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="0 <= min_givens <= max_givens <= 16"):
        SudokuTask(low, high)


def test_a_split_with_too_few_puzzles_is_an_error_and_no_endless_search() -> None:
    # All 16 cells given: 288 puzzles, about 18 of them in the test split.
    with pytest.raises(ValueError, match=r"min_givens 16 .* leave only \d+ test puzzles where 100 are asked for"):
        SudokuTask(16, 16).heldout_examples(100)
    assert len(SudokuTask(16, 16).train_examples(0, 0, 400)) == 400, "training draws with repetition"
    # No cell given: one puzzle, in one split.
    empty = [split for split in ("train_examples", "heldout_examples") if _draws(split)]
    assert len(empty) <= 1


def _draws(method: str) -> bool:
    task = SudokuTask(0, 0)
    try:
        rows = task.train_examples(0, 0, 1) if method == "train_examples" else task.heldout_examples(1)
    except ValueError:
        return False
    return len(rows) == 1


def test_the_reward_agrees_with_brute_force() -> None:
    rng = random.Random(0)
    verdicts = []
    for row in SudokuTask().train_examples(3, 0, 60):
        right = solutions(row["puzzle"])
        # Its own answer, another solution, a right grid of another puzzle, one digit off, a blank left.
        other = rng.choice(all_grids())
        cell = rng.randrange(16)
        wrong = row["answer"][:cell] + str(int(row["answer"][cell]) % 4 + 1) + row["answer"][cell + 1 :]
        blank = row["answer"][:cell] + "0" + row["answer"][cell + 1 :]
        tried = [row["answer"], rng.choice(sorted(right)), other, wrong, blank]
        scores = sudoku([row["prompt"]] * 5, tried, puzzle=[row["puzzle"]] * 5)
        assert [score.value for score in scores] == [float(grid in right) for grid in tried]
        verdicts += [score.value for score in scores]
    assert 120 <= sum(verdicts) < 180


def test_puzzles_come_from_a_file(tmp_path) -> None:
    path = tmp_path / "puzzles.csv"
    path.write_text("Puzzle,Solution\n0300102001020000,x\n 1234341221434321 ,x\n")
    rows = SudokuTask().file_examples(str(path))
    assert rows == [
        {"prompt": "0300102001020000=", "puzzle": "0300102001020000"},
        {"prompt": "1234341221434321=", "puzzle": "1234341221434321"},
    ]


def test_violations_of_a_grid_are_what_the_reward_punishes() -> None:
    task = SudokuTask()
    grid = list("3431" + "2112" + "1243" + "4=2")
    assert task.violations({"puzzle": "0000040000000000"}, [*grid, ""]) == [
        ("3 twice in row 1", [0, 2]),
        ("1 twice in row 2", [5, 6]),
        ("2 twice in row 2", [4, 7]),
        ("1 twice in box 2", [3, 6]),
        ("given 4 changed to 1", [5]),
        ("= is no digit from 1 to 4", [13]),
        ("nothing is no digit from 1 to 4", [15]),
    ]
    assert ("4 3 times in row 1", [1, 2, 3]) in task.violations({"puzzle": "0" * 16}, list("1444" + "2" * 12))
    rng = random.Random(0)
    for row in task.heldout_examples(40):
        for cells in (list(row["answer"]), [rng.choice("1234") if rng.random() < 0.1 else c for c in row["answer"]]):
            (score,) = sudoku([row["prompt"]], ["".join(cells)], puzzle=[row["puzzle"]])
            assert (score.value == 1) == (task.violations(row, cells) == []), (row, cells)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold rows with named columns"),
        ("Puzzle\n", "must hold rows with named columns"),
        ("puzzle\n0300102001020000\n", "a Sudoku file has a column Puzzle; this one has puzzle"),
        ("Puzzle\n0300102001020000\n030010200102000\n", r"puzzles\.csv: row 2: column Puzzle must be 16 digits"),
        ("Puzzle\n0300102001020005\n", r"puzzles\.csv: row 1: column Puzzle must be 16 digits 0 to 4"),
        ("Solution,Puzzle\n1\n", r"puzzles\.csv:2: row 1 has 1 fields, the header names 2"),
    ],
)
def test_a_file_that_is_no_sudoku_file_is_refused(tmp_path, text: str, message: str) -> None:
    path = tmp_path / "puzzles.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        SudokuTask().file_examples(str(path))
    with pytest.raises(ValueError, match=r"none\.csv does not exist"):
        SudokuTask().file_examples(str(tmp_path / "none.csv"))


def test_the_published_puzzles_can_be_read(shared_data) -> None:
    rows = SudokuTask().file_examples(str(shared_data / "puzzles" / "spg_4x4_test_sudoku_split_new.csv"))
    assert len(rows) == 256
    assert all(7 <= row["puzzle"].count("0") <= 12 for row in rows)
    assert all(len(solutions(row["puzzle"])) == 1 for row in rows)


# --- any file ---------------------------------------------------------------------------------------------------------


def write_rows(path, count: int) -> str:
    path.write_text("".join(json.dumps({"q": f"question {i}", "a": i, "level": 3}) + "\n" for i in range(count)))
    return str(path)


def test_a_jsonl_task_gives_prompts_answers_and_columns(tmp_path) -> None:
    path = write_rows(tmp_path / "train.jsonl", 4)
    task = JsonlTask(path, heldout=path, prompt_column="q", answer_column="a", template="Q: {prompt}\nA:")
    assert task.heldout_examples(2) == [
        {"q": f"question {i}", "a": i, "level": 3, "prompt": f"Q: question {i}\nA:", "answer": str(i)} for i in range(2)
    ]
    assert task.validation_examples(1) == task.heldout_examples(1)


def test_every_epoch_visits_every_row_once_in_its_own_order(tmp_path) -> None:
    task = JsonlTask(write_rows(tmp_path / "train.jsonl", 10), prompt_column="q")
    # 20 steps of 3 are six epochs of 10; steps reach over the ends of epochs.
    seen = [row["a"] for step in range(20) for row in task.train_examples(seed=1, step=step, count=3)]
    epochs = [seen[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert [row["a"] for row in task.train_examples(seed=1, step=7, count=3)] == seen[21:24]
    assert [row["a"] for row in task.train_examples(seed=2, step=0, count=10)] != epochs[0]


def test_files_that_cannot_be_used_are_refused_in_one_line(tmp_path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\nnot json\n')
    (tmp_path / "ragged.jsonl").write_text('{"prompt": "a"}\n{"prompts": "b"}\n')
    train = write_rows(tmp_path / "train.jsonl", 2)
    for path, message in (
        (tmp_path / "none.jsonl", r"none\.jsonl does not exist"),
        (tmp_path / "empty.jsonl", r"empty\.jsonl must hold rows .* at least one"),
        (tmp_path / "broken.jsonl", r"broken\.jsonl:2: not JSON"),
        (tmp_path / "ragged.jsonl", r"ragged\.jsonl: row 2 has no 'prompt': fill it in"),
        (train, r"has no column 'prompt'; it has q, a, level"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            JsonlTask(str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"task\.params\.heldout is not set"):
        JsonlTask(train, prompt_column="q").heldout_examples(1)


# --- names ------------------------------------------------------------------------------------------------------------


def test_tasks_by_name_and_by_path() -> None:
    task = load_task("sudoku", {"min_givens": 6})
    assert isinstance(task, SudokuTask) and task.min_givens == 6
    assert isinstance(load_task("rl.tasks.sudoku:SudokuTask", {}), SudokuTask)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("sudoko", {}, r"task\.name 'sudoko' does not exist, did you mean 'sudoku'\?"),
        ("sudoku", {"givens": 4}, r"task\.params has unknown key 'givens'; sudoku takes min_givens, max_givens"),
        ("sudoku", {"min_givens": 9}, "0 <= min_givens <= max_givens <= 16"),
    ],
)
def test_a_task_that_does_not_exist_is_an_error_with_a_hint(name: str, params: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_task(name, params)


class _Settings(TypedDict):
    size: int


class _Own:
    def __init__(self, settings: _Settings | None = None):
        self.settings = settings


def test_a_type_that_cannot_be_checked_passes() -> None:
    """Before Python 3.12 pydantic refuses `typing.TypedDict` itself."""
    task: Any = load_task("tests.test_tasks:_Own", {"settings": {"size": 3}})
    assert task.settings == {"size": 3}


# --- tokenizer --------------------------------------------------------------------------------------------------------


def test_the_character_tokenizer_is_the_identity_there_and_back(tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer = char_tokenizer("01234=")
    assert len(tokenizer) == 9
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (6, 7, 8)
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in map("".join, itertools.product("014=", repeat=4)):
            ids = each(text, add_special_tokens=False).input_ids
            assert len(ids) == 4 and each.decode(ids) == text
        assert each("12=0", add_special_tokens=False).input_ids == [1, 2, 5, 0]
        assert each.decode([1, 6, 7, 2], skip_special_tokens=True) == "12"
        assert each.decode([1, 6, 7]) == "1<mask><eos>"


def test_the_character_tokenizer_keeps_white_space_and_repeated_letters() -> None:
    tokenizer = char_tokenizer("ab \n,")
    text = "a b,\n\n ba ,"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert len(char_tokenizer("aabba")) == 5


def test_a_character_outside_the_alphabet_is_an_error() -> None:
    with pytest.raises(Exception, match="UNK"):
        char_tokenizer("01")("012", add_special_tokens=False)


def test_a_task_with_the_old_names_is_told_the_new_ones(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old_task.py").write_text(
        "class Task:\n    def train_rows(self, seed, step, count):\n        return []\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="its method train_rows is now called train_examples"):
        load_task("old_task.py:Task", {})
