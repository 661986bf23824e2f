"""The code reward: which code counts, which rows it reads, and what is a score."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rewards.code_tests import CodeTests, extract_code
from rewards.load import load_reward
from rewards.sandbox.rows import code_task


@pytest.fixture(scope="module")
def reward() -> Iterator[CodeTests]:
    with CodeTests(timeout_seconds=5) as made:
        yield made


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("a\n```python\nx = 1\n```\nb\n```python\nx = 2\n```\nc", "x = 2\n"),
        ("```py\nx = 1\n```\nIt prints:\n```\n1\n```\n", "x = 1\n"),
        ("```\nx = 1\n```\n", "x = 1\n"),
        ("```bash\nls\n```\n```\nx = 1\n```\n```text\nout\n```", "x = 1\n"),
        ("```Python3\nx = 1\n```", "x = 1\n"),
        ("  ```python\n  x = 1\n  ```", "  x = 1\n"),
        ("```python title=main\nx = 1\n```", "x = 1\n"),
        ("so\n```python\nx = 1\ny = 2", "x = 1\ny = 2"),
        ("```python\nx = 1\n```\nbetter:\n```python\nx = 2", "x = 1\n"),
        ("```bash\nls\n```", "```bash\nls\n```"),
        ("```python\ns = '```'\n```", "s = '```'\n"),
        ("", ""),
    ],
)
def test_which_code_counts(completion: str, code: str) -> None:
    assert extract_code(completion) == code


def test_a_text_of_fences_takes_one_pass() -> None:
    """4,000 opening fences took 46 s, outside of every limit."""
    start = time.monotonic()
    assert extract_code("```python\n" * 40_000) == ""
    assert time.monotonic() - start < 10


def score(reward: CodeTests, completion: Any, **row: Any) -> Any:
    (found,) = reward(prompts=[""], completions=[completion], **{name: [value] for name, value in row.items()})
    return found


GOOD, BAD = "```python\ndef f(x):\n    return x + 1\n```", "```python\ndef f(x):\n    return x\n```"
ECHO = "print(input())"

ROWS = [
    ({"tests": ["assert f(1) == 2", "assert f(2) == 3"]}, GOOD, BAD),
    ({"tests": "assert f(1) == 2\nassert f(2) == 3"}, GOOD, BAD),
    ({"test_list": ["assert f(one) == 2"], "test_setup_code": "one = 1"}, GOOD, BAD),
    ({"tests": ["assert f(one) == 2"], "test_setup": "one = 1", "test_list": None}, GOOD, BAD),
    ({"test": "def check(candidate):\n    assert candidate(1) == 2", "entry_point": "f"}, GOOD, BAD),
    ({"test": "assert f(1) == 2"}, GOOD, BAD),
    (
        {"tests": ["assert f(1) == 2"], "code_prefix": "def f(x):\n", "entry_point": "f"},
        "    return x + 1",
        "    return x",
    ),
    ({"test_list": ["assert f(1) == 2"], "prefix": "import math", "entry_point": None}, GOOD, BAD),
    ({"inputs": ["a b", "c"], "outputs": ["a b\n", "c"]}, ECHO, "print('a b')"),
    ({"test_input": ["a"], "test_output": ["a"], "test_method": "stdio"}, ECHO, "print(1)"),
    ({"input_output": json.dumps({"inputs": ["a\n"], "outputs": [["a"]]})}, ECHO, "print(1)"),
    ({"input_output": {"inputs": [[1], [5]], "outputs": [[2], 6], "fn_name": "f"}}, GOOD, BAD),
    (
        {"input_output": {"inputs": ["[1, 2]\n3"], "outputs": ["[1, 2, 3]"], "fn_name": "join"}},
        "class Solution:\n    def join(self, a, b): return (*a, b)",
        "class Solution:\n    def join(self, a, b): return a",
    ),
]


@pytest.mark.parametrize(("row", "good", "bad"), ROWS)
def test_rows(reward: CodeTests, row: dict[str, Any], good: str, bad: str) -> None:
    columns = {name: [value, value] for name, value in row.items()}
    right, wrong = reward(prompts=["", ""], completions=[good, bad], **columns)
    assert (right.value, right.metrics["tests_passed"]) == (1.0, 1.0)
    assert wrong.value == 0.0
    assert wrong.reason is None


def test_chat_completions_and_what_trl_adds(reward: CodeTests) -> None:
    answer = [{"role": "assistant", "content": GOOD}]
    found = reward(
        prompts=[[{"role": "user", "content": "?"}]],
        completions=[answer],
        tests=[["assert f(1) == 2"]],
        completion_ids=[[1, 2]],
        trainer_state=None,
        log_metric=print,
    )
    assert [score.value for score in found] == [1.0]


def test_programs_that_fail_are_wrong_and_what_cannot_be_judged_has_no_score(reward: CodeTests) -> None:
    tests = ["assert f(1) == 2"]
    completions = ["import sys; sys.exit(0)", "def f(:", "", GOOD, GOOD, GOOD]
    rows: list[Any] = [tests, tests, tests, tests, ["assert f(1) =="], []]
    scores = reward(prompts=[""] * 6, completions=completions, tests=rows)
    assert [score.value for score in scores] == [0.0, 0.0, 0.0, 1.0, None, None]
    assert scores[4].failed and "do not compile" in scores[4].reason and not scores[4].transient
    assert scores[5].failed and "empty list of tests" in scores[5].reason


def test_fraction() -> None:
    with CodeTests(aggregate="fraction", timeout_seconds=1) as reward:
        asserts = score(reward, GOOD, tests=["assert f(1) == 2", "assert f(1) == 3", "assert f(0) == 1", "assert f(9)"])
        inputs = score(reward, "print(int(input()) // 2)", inputs=["2", "3", "x", "4"], outputs=["1", "9", "1", "2"])
        loop = "n = int(input())\nwhile n > 2: pass\nprint(n)"
        late = score(reward, loop, inputs=["1", "2", "3", "4", "5"], outputs=["1", "2", "3", "4", "5"])
    assert (asserts.value, asserts.metrics["tests_passed"]) == (0.75, 0.75)
    assert inputs.value == 0.5
    assert late.value == pytest.approx(0.4)
    assert late.metrics["timeout"] == 1.0
    assert late.metrics["cpu_seconds"] < 3  # at most one round of two beyond the limit, not three


def test_numbers_may_differ_when_asked() -> None:
    row = {"inputs": [""], "outputs": ["0.333333"]}
    with CodeTests(float_tolerance=1e-5) as near, CodeTests() as exact:
        assert score(near, "print(1 / 3)", **row).value == 1.0
        assert score(exact, "print(1 / 3)", **row).value == 0.0


def test_a_sandbox_that_fails_gives_no_score_worth_a_retry() -> None:
    with CodeTests(memory_mb=10**15) as reward:
        found = score(reward, ECHO, inputs=["1"], outputs=["1"])
    assert found.value is None and found.transient
    assert "sandbox" in found.reason


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": ["1"]}, "the row has no tests; give one of the columns tests, test_list"),
        ({"input_output": "{"}, "input_output is not JSON"),
        ({"input_output": "[]"}, "needs `inputs` and `outputs`"),
        ({"tests": []}, "empty list of tests"),
    ],
)
def test_rows_that_cannot_be_read(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        code_task("x = 1", row)


def test_mistakes_are_named(reward: CodeTests) -> None:
    with pytest.raises(ValueError, match="needs the tests in one of the columns tests, test_list"):
        reward(prompts=[""], completions=["x"], answer=["1"])
    with pytest.raises(ValueError, match="aggregate must be 'all' or 'fraction'"):
        CodeTests(aggregate="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cpu_seconds must be above 0"):
        CodeTests(timeout_seconds=0)


def test_it_loads_by_name_with_parameters() -> None:
    made = load_reward("rewards.code_tests:CodeTests", {"aggregate": "fraction", "timeout_seconds": 2})
    with made as loaded:  # type: ignore[attr-defined]
        assert score(loaded, GOOD, tests=["assert f(1) == 2", "assert f(1) == 3"]).value == 0.5
    with pytest.raises(ValueError, match="no parameter 'timeout'"):
        load_reward("rewards.code_tests:CodeTests", {"timeout": 2})
