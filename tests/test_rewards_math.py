"""Final answers of mathematics problems, on labelled real solutions and on hand-picked traps."""

import json
import signal
import threading
import time

import pytest

from rewards.math_answer import MathAnswer, final_answer, reference_answer
from rewards.math_equal import math_equal, number_of


def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def math_answer(prompts, completions, answer, **params):
    return MathAnswer(**params)(prompts, completions, answer=answer)


@pytest.mark.parametrize("model", ["6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"])
def test_all_labelled_gsm8k_solutions_are_judged_as_labelled(shared_data, model):
    rows = read_lines(shared_data / "verify" / "gsm8k_example_model_solutions.jsonl")
    golds = [row["ground_truth"].rpartition("A:")[2] for row in rows]
    scores = math_answer([""] * len(rows), [row[model]["solution"] for row in rows], golds)
    labels = [float(row[model]["is_correct"]) for row in rows]
    assert len(labels) == 1319
    assert 0 < sum(labels) < 1319
    assert [score.value for score in scores] == labels


def test_gsm8k_references_judge_themselves_right(shared_data):
    rows = read_lines(shared_data / "math" / "gsm8k_test.jsonl")
    answers = [row["answer"] for row in rows]
    assert sum(score.value for score in math_answer([""] * 1319, answers, answers, anchor="hash")) == 1319
    assert sum(number_of(reference_answer(answer)) is None for answer in answers) == 0


def test_math500_solutions_match_their_answers_and_not_their_neighbours(shared_data):
    rows = read_lines(shared_data / "math" / "math500_test.jsonl")
    golds, solutions = [row["answer"] for row in rows], [row["solution"] for row in rows]
    right = math_answer([""] * 500, solutions, golds, anchor="boxed")
    assert [gold for gold, score in zip(golds, right, strict=True) if score.value != 1.0] == []
    shifted = math_answer([""] * 500, solutions[1:] + solutions[:1], golds, anchor="boxed")
    accepted = [
        (gold, final_answer(other))
        for gold, other, score in zip(golds, solutions[1:] + solutions[:1], shifted, strict=True)
        if score.value != 0.0
    ]
    assert accepted == [("5", "x=5"), ("7", "7"), ("3", "3")]


def test_hendrycks_cases(shared_data):
    cases = read_lines(shared_data / "verify" / "hendrycks_equiv_cases.jsonl")
    assert [math_equal(case["a"], case["b"], ordered=True) for case in cases] == [case["expected"] for case in cases]
    # By default lists are compared in any order; exactly the two cases about order change.
    changed = [
        case["source"].rpartition("::")[2] for case in cases if math_equal(case["a"], case["b"]) != case["expected"]
    ]
    assert changed == ["test_order", "test_decimals"]


SAME = [
    ("(1,2)", "( 1, 2 )"), ("(3,4)", r"\left(3,4\right)"), (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    (r"10\%", "10"), (r"1\frac{4}{5}", "9/5"), (r"137 \frac{1}{2}", "137.5"), ("2516_8", "2516"),
    (r"\text{Evelyn}", "evelyn"), (r"90^\circ", "90"), ("90", r"90 \text{ degrees}"), (r"\text{(C)}", "C"),
    (r"x \in [-2,7]", "[-2,7]"), ("6-5i", "-5i+6"), ("4", "x=4"), (r"5.4 \text{ cents}", "5.4"), (r"\$18.90", "18.9"),
    (r"3 \pm 2 \sqrt{2}", r"3+2\sqrt2, 3-2\sqrt2"), (r"\{1\pm\sqrt{5},-2\}", r"\{1+\sqrt5,1-\sqrt5,-2\}"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"), ("58,500", "58500"), (r"\$32,\!348", "32348"),
    (r"(0,9) \cup (9,36)", r"(9,36)\cup(0,9)"), (".0000672", "6.72e-5"), (".0000672", r"6.72\times 10^{-5}"),
    ("1/3", "0.333333"), ("-3", "-3.0"), ("y = 2x + 3", "2x+3"), ("1,-2", "-2 and 1"), ("(x+1)^2", "x^2+2x+1"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix} -\frac13 \\ \frac23 \end{pmatrix}"),
    (r"\cot x", r"\frac{1}{\tan x}"), (r"15\mbox{ cm}^2", "15"), ("12 apples", "12"), ("2^{10}", "1024"),
    ("2k", "k*2"), ("5x - 7y = 0", "-5x + 7y = 0"),
]  # fmt: skip
DIFFERENT = [
    ("(1,2)", "(2,1)"), ("(2,1)", "(3,1)"), ("[1,2)", "[1,2]"), ("(1,2)", "[1,2]"), ("4210_5", "4210_6"), ("-5", "5"),
    (r"\text{Evelyn}", "Navin"), ("1/3", "0.33"), ("p - q", "q-p"), ("1,-2", "1"), ("1", "1,-2"), ("1,1,2", "1,2,2"),
    ("0", ""), (r"70 \sqrt{2}", "98.99"), (r"\infty", r"-\infty"), ("1000000", "1000001"), ("2", "(((2"),
    ("even", "odd"), ("2k", "3k"),
    ("0.0000001", "0.0000002"), ("(1,2)", "(1,2,3)"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_same(gold, answer):
    assert math_equal(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(gold, answer):
    assert not math_equal(gold, answer)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (r"first \boxed{1}, no: \boxed{2}", "2"),
        ("so 5 + 5\n#### 10\n", "10"),
        ("#### 1\nwait\n#### -1,234", "-1,234"),
        ("The answer is 42.", "42"),
        ("Answer: $\\frac{1}{2}$ as wanted", r"\frac{1}{2}"),
        ("He has 3 dogs.\nA: 12", "12"),
        ("first 3, then 4 and finally 17 apples", "17"),
        ("-7", "-7"),
        ("<think>it is 5</think><answer>6</answer>", "6"),
        ("", None),
        ("no number at all\nanywhere", None),
    ],
)
def test_final_answer(completion, answer):
    assert final_answer(completion) == answer


def test_anchors_are_required_when_asked_for():
    for anchor, completion in (("boxed", "#### 4"), ("hash", r"\boxed{4}"), ("boxed", "4"), ("hash", "4")):
        assert math_answer([""], [completion], ["4"], anchor=anchor)[0].value == 0.0
        assert math_answer([""], [completion], ["4"])[0].value == 1.0
    with pytest.raises(ValueError, match="anchor must be one of"):
        math_answer([""], ["4"], ["4"], anchor="box")


def test_rows_without_reference_do_not_apply():
    scores = math_answer([""] * 2, ["4", "4"], [None, ""])
    assert [(score.value, score.failed) for score in scores] == [(None, False)] * 2


@pytest.mark.parametrize("bomb", ["9^{9^{9^9}}", "(10^{10})!", r"\binom{10^9}{5^9}"])
def test_an_answer_that_cannot_be_computed_is_a_timeout_not_a_zero(bomb):
    score = math_answer([""], [rf"\boxed{{{bomb}}}"], [r"\frac{\pi}{3}"], verdict_seconds=0.5)[0]
    assert score.failed
    assert score.reason == "timeout: comparing two answers took more than 0.5 s"


@pytest.mark.parametrize(
    "odd", ["(" * 400, "{" * 400, "9" * 480, r"\frac" * 80, "1e99999999", "," * 300, "\x00", "x" * 9999]
)
def test_odd_answers_are_wrong_quickly(odd):
    assert math_answer([""], [rf"\boxed{{{odd}}}"], ["5"], verdict_seconds=5.0)[0].value == 0.0


def test_no_signal_is_touched_off_the_main_thread():
    """math-verify's own alarms raise in a thread; TRL #5281 crashed on it, verl #5635 scored 0."""
    found = []
    thread = threading.Thread(target=lambda: found.extend(math_answer([""], [r"\boxed{\frac{x}{2}}"], [r"0.5x"])))
    thread.start()
    thread.join()
    assert [score.value for score in found] == [1.0]


def test_a_pending_alarm_of_the_caller_survives():
    """Also this suite's own: pytest-timeout keeps an alarm while a test runs."""
    outer_left = signal.getitimer(signal.ITIMER_REAL)[0]
    rang = []
    outer_handler = signal.signal(signal.SIGALRM, lambda number, frame: rang.append(number))
    signal.setitimer(signal.ITIMER_REAL, 30)
    try:
        slow = math_answer([""], [r"\boxed{(10^{10})!}"], [r"\frac{\pi}{3}"], verdict_seconds=0.3)
        assert slow[0].failed
        assert 25 < signal.getitimer(signal.ITIMER_REAL)[0] < 30
        assert rang == []
        # An alarm that was due during a comparison rings right after it.
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        math_answer([""], [r"\boxed{(10^{10})!}"], [r"\frac{\pi}{3}"], verdict_seconds=5.0)
        time.sleep(0.1)
        assert rang == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, outer_left)
        signal.signal(signal.SIGALRM, outer_handler)
