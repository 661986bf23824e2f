"""The code reward on public data (see `shared_data`): every reference passes, every trivial or broken answer fails."""

from __future__ import annotations

import base64
import gzip
import json
import pickle
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rewards.code_tests import CodeTests
from rewards.score import Score

LIAR = """class Liar:
    def __eq__(self, other): return True
    def __lt__(self, other): return True
    __gt__ = __le__ = __ge__ = __contains__ = __lt__
    def __sub__(self, other): return 0.0
    __rsub__ = __abs__ = __sub__
def {name}(*args): return Liar()
"""


@pytest.fixture(scope="module")
def reward() -> Iterator[CodeTests]:
    with CodeTests(timeout_seconds=60) as made:
        yield made


@pytest.fixture(scope="module")
def code_data(shared_data: Path) -> Path:
    folder = shared_data / "code"
    if not folder.is_dir():
        pytest.skip("the shared data has no folder `code`")
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return [json.loads(line) for line in text.splitlines()]


def judge(reward: CodeTests, answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[Score]:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return reward(prompts=[""] * len(rows), completions=answers, **columns)


def values(scores: Sequence[Score]) -> list[float | None]:
    return [score.value for score in scores]


@pytest.fixture(scope="module")
def human_eval(code_data: Path) -> list[dict[str, Any]]:
    rows = read(code_data / "HumanEval.jsonl.gz")
    return [{**row, "code_prefix": row["prompt"], "name": row["entry_point"]} for row in rows]


def test_human_eval_references_pass(reward: CodeTests, human_eval: list[dict[str, Any]]) -> None:
    scores = judge(reward, [row["canonical_solution"] for row in human_eval], human_eval)
    assert values(scores) == [1.0] * 164


def test_human_eval_trivial_answers_fail(reward: CodeTests, human_eval: list[dict[str, Any]]) -> None:
    bodies = ["    pass", "    import sys; sys.exit(0)", "    import os; os._exit(0)"]
    answers = [bodies[number % 3] for number in range(164)]
    assert values(judge(reward, answers, human_eval)) == [0.0] * 164
    assert values(judge(reward, [bodies[0]] * 164, human_eval)) == [0.0] * 164


def test_human_eval_answers_that_equal_everything_fail(reward: CodeTests, human_eval: list[dict[str, Any]]) -> None:
    answers = ["    pass\n" + LIAR.format(name=row["name"]) for row in human_eval]
    assert values(judge(reward, answers, human_eval)) == [0.0] * 164


def test_human_eval_pack(code_data: Path) -> None:
    rows = read(code_data / "humanevalpack_python.jsonl")
    tests = [{"tests": row["test"], "code_prefix": row["prompt"], "entry_point": row["entry_point"]} for row in rows]
    with CodeTests(timeout_seconds=2) as reward:
        right = judge(reward, [row["canonical_solution"] for row in rows], tests)
        wrong = judge(reward, [row["buggy_solution"] for row in rows], tests)
    assert values(right) == [1.0] * 164
    assert values(wrong) == [0.0] * 164


def test_mbpp_references_pass(reward: CodeTests, code_data: Path) -> None:
    """All 974, number 123 among them, which needs about ten seconds."""
    rows = read(code_data / "mbpp.jsonl")
    scores = judge(reward, [f"```python\n{row['code']}\n```" for row in rows], rows)
    assert [row["task_id"] for row, score in zip(rows, scores, strict=True) if score.value != 1.0] == []
    assert len(scores) == 974


def test_mbpp_answers_to_the_next_task_fail(code_data: Path) -> None:
    rows = read(code_data / "mbpp.jsonl")[:50]
    with CodeTests(timeout_seconds=5) as reward:
        scores = judge(reward, [row["code"] for row in [*rows[1:], rows[0]]], rows)
    assert values(scores) == [0.0] * 50


# The tests of these samples are themselves broken; a plain `exec` of reference and tests fails on them too.
SHADOW_BROKEN: dict[str, float | None] = {
    "separate_brace_groups": None,  # a syntax error: no verdict
    "shortest": 0.0,  # quotes are missing: NameError
    "poly_diff": 0.0,  # the entry point is the helper
    "sort_even": 0.0,  # calls a function of another task
    "reverse_odd": 0.0,  # reverses the even places
}


def test_sandbox_fusion_functions(reward: CodeTests, code_data: Path) -> None:
    folder = code_data / "sandboxfusion_samples"
    mbpp = read(folder / "code_eval_mbpp.jsonl")
    rows = [{"tests": row["test_list"] + row["labels"]["challenge_test_list"]} for row in mbpp]
    assert values(judge(reward, [row["canonical_solution"] for row in mbpp], rows)) == [1.0] * 20
    assert values(judge(reward, ["pass"] * 20, rows)) == [0.0] * 20

    shadow = read(folder / "code_eval_shadow_humaneval_python.jsonl")
    names = [json.loads(row["labels"])["entry_point"] for row in shadow]
    rows = [
        {"test": row["test"], "entry_point": name, "code_prefix": row["content"]}
        for row, name in zip(shadow, names, strict=True)
    ]
    expected: list[float | None] = [SHADOW_BROKEN.get(name, 1.0) for name in names]
    assert values(judge(reward, [row["canonical_solution"] for row in shadow], rows)) == expected
    assert 1.0 not in values(judge(reward, ["    pass"] * 20, rows))

    crux = read(folder / "code_eval_cruxeval.jsonl")
    rows = [{"tests": [f"assert f({row['input']}) == {row['output']}"]} for row in crux]
    assert values(judge(reward, [row["code"] for row in crux], rows)) == [1.0] * 20
    assert values(judge(reward, ["def f(*args): return args"] * 20, rows)) == [0.0] * 20


# By position; the samples come without solutions.
SOLVED = {
    1: """
def xyz_there(s):
    return any(s[i:i + 3] == 'xyz' and s[i - 1:i] != '.' for i in range(len(s)))
def integral():
    return 1.570796
def countPrimes(n):
    return sum(all(i % d for d in range(2, int(i ** 0.5) + 1)) for i in range(2, n))
def calculate(s):
    return eval(s.replace('/', '//'))
import hashlib
""",
    2: """
def solve():
    a, b = map(int, input().split())
    print(max(a + b, a - b, a * b))
""",
}


def test_sandbox_fusion_judge(reward: CodeTests, code_data: Path) -> None:
    """Tests that call a function, and tests that put text into the standard input of one."""
    tests = [row["test"] for row in read(code_data / "sandboxfusion_samples/code_eval_rl_train_oj_0328_1707.jsonl")]
    rows = [{"tests": test} for test in tests]
    assert values(judge(reward, ["def solve(*args): pass"] * 20, rows)) == [0.0] * 20
    called = [
        any(f"{name}(" in test for name in ("xyz_there", "integral", "countPrimes", "calculate")) for test in tests
    ]
    assert sum(called) == 4
    scores = judge(reward, [SOLVED[1]] * 20, rows)
    assert values(scores) == [float(known) for known in called]
    streams = ["input_values" in test for test in tests]
    assert sum(streams) == 3
    scores = judge(reward, [SOLVED[2]] * 20, rows)
    assert sum(score.value or 0.0 for score in scores) == 1  # one of the three, on its real input and output


LIVE_CODE_BENCH = {
    1: "for _ in range(int(input())): print('YES' if sum(map(str.__ne__, input(), 'abc')) < 3 else 'NO')",
    10: "class Solution:\n    def countSeniors(self, details): return sum(int(d[11:13]) > 60 for d in details)",
    191: "n, s = int(input()), input()\nt, a = s.count('T'), s.count('A')\n"
    "print('T' if t > a or t == a and s[-1] == 'A' else 'A')",
}


def test_live_code_bench_samples(reward: CodeTests, code_data: Path) -> None:
    """The reference of these samples is `sys.exit(0)`: it must fail."""
    samples = read(code_data / "sandboxfusion_samples/code_eval_live_code_bench_v1.jsonl")
    packed = [zlib.decompress(base64.b64decode(row["test"])) for row in samples]
    # The file is pinned and these are its own bytes; nothing that ships unpickles anything.
    rows = [{"input_output": pickle.loads(data)["input_output"]} for data in packed]
    assert values(judge(reward, [row["canonical_solution"] for row in samples], rows)) == [0.0] * 3
    assert values(judge(reward, [LIVE_CODE_BENCH[row["id"]] for row in samples], rows)) == [1.0] * 3
