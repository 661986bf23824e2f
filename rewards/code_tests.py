"""Code, judged by tests: function asserts, or standard input and output.

Which code counts: the last complete fenced block tagged python, py or python3; else the last one without a tag; else,
when the last fence is never closed, what follows it; without any fence the whole completion.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Literal

from rewards.sandbox import CodeSandbox, Limits, RunResult
from rewards.sandbox.compare import outputs_match
from rewards.sandbox.remote import RemoteSandbox
from rewards.sandbox.rows import COLUMNS, CodeTask, code_task
from rewards.score import Score
from rewards.text import text_of

FENCE = re.compile(r"[ \t]*```[ \t]*(\w*)(.*)", re.DOTALL)
PYTHON_TAGS = {"python", "python3", "py"}


class CodeTests:
    """1.0 when the code passes every test, else 0.0; or the share of tests passed.

    A program that fails, crashes, exits, runs too long or writes too much is wrong: 0. Only tests that cannot be
    used and failures of the sandbox itself give no score.

    After a time limit was hit, a completion's remaining tests count as failed without being run; with
    `aggregate="all"` the same after any failed input.

    Args:
        aggregate: "all" or "fraction".
        timeout_seconds: CPU time per program: per input, or for a list of asserts all together.
        memory_mb: memory limit of a program, MiB.
        max_workers: programs run at once.
        float_tolerance: numbers in outputs may differ by this much (absolutely or relatively); None compares text.
        isolation: see `rewards.sandbox.CodeSandbox`.
        sandbox_url: address of a SandboxFusion server to use instead of this machine.

    Raises:
        ValueError: for a bad parameter.
    """

    def __init__(
        self,
        aggregate: Literal["all", "fraction"] = "all",
        timeout_seconds: float = 10.0,
        memory_mb: int = 1024,
        max_workers: int = 2,
        float_tolerance: float | None = None,
        isolation: str = "auto",
        sandbox_url: str | None = None,
    ) -> None:
        if aggregate not in ("all", "fraction"):
            raise ValueError(f"aggregate must be 'all' or 'fraction', got '{aggregate}'")
        self.aggregate = aggregate
        self.float_tolerance = float_tolerance
        limits = Limits(cpu_seconds=timeout_seconds, memory_mb=memory_mb)
        self.sandbox: CodeSandbox | RemoteSandbox
        if sandbox_url:
            self.sandbox = RemoteSandbox(sandbox_url, max_workers=max_workers, limits=limits)
        else:
            self.sandbox = CodeSandbox(max_workers=max_workers, limits=limits, isolation=isolation)

    __name__ = "code_tests"

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[Score]:
        """Score completions, which are texts or chats, by tests in `columns` (the forms of `rewards.sandbox.rows`).

        Returns:
            One `Score` per completion, with metrics `tests_passed` (share), `timeout` (0 or 1) and `cpu_seconds`.

        Raises:
            ValueError: when no column holds tests.
        """
        if not any(name in columns for name in COLUMNS):
            raise ValueError(f"code_tests needs the tests in one of the columns {', '.join(COLUMNS)}")
        size = len(completions)
        rows = [
            {name: column[index] for name, column in columns.items() if _is_column(column, size)}
            for index in range(size)
        ]
        scores: dict[int, Score] = {}
        tallies: dict[int, _Tally] = {}
        for index, (completion, row) in enumerate(zip(completions, rows, strict=True)):
            try:
                task = code_task(extract_code(text_of(completion)), row)
                tallies[index] = _Tally(task, self.aggregate == "all", self.float_tolerance)
            except (ValueError, KeyError, TypeError) as error:
                scores[index] = Score(None, reason=f"code tests: {error}")
        self._run(list(tallies.values()))
        scores |= {index: tally.score(self.aggregate) for index, tally in tallies.items()}
        return [scores[index] for index in range(size)]

    def close(self) -> None:
        """End the sandbox's processes; the next call starts new ones."""
        self.sandbox.close()

    def __enter__(self) -> CodeTests:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _run(self, tallies: list[_Tally]) -> None:
        # In rounds, so that a program that hangs hangs on one input, not on each.
        while active := [tally for tally in tallies if tally.waiting]:
            width = math.ceil(self.sandbox.max_workers / len(active))
            batch = [(tally, position) for tally in active for position in tally.next(width)]
            results = self.sandbox.run([tally.task.programs[position] for tally, position in batch])
            for (tally, position), result in zip(batch, results, strict=True):
                tally.add(position, result)


class _Tally:
    """How one completion is doing."""

    def __init__(self, task: CodeTask, stop_early: bool, float_tolerance: float | None) -> None:
        self.task, self.stop_early, self.float_tolerance = task, stop_early, float_tolerance
        self.waiting = list(range(len(task.programs)))
        self.num_passed = 0
        self.timeout = False
        self.cpu_seconds = 0.0
        self.problem: Score | None = None

    def next(self, width: int) -> list[int]:
        taken, self.waiting = self.waiting[:width], self.waiting[width:]
        return taken

    def add(self, position: int, result: RunResult) -> None:
        self.cpu_seconds += result.cpu_seconds
        self.timeout |= result.status == "timeout"
        if not result.has_verdict:
            transient = result.status == "infrastructure"
            self.problem = Score(None, reason=f"code tests: {result.reason}", transient=transient)
        if self.task.expected:
            wanted = self.task.expected[position]
            passed = result.status == "ok" and outputs_match(result.stdout, wanted, self.float_tolerance)
            self.num_passed += passed
        else:
            passed = result.passed
            self.num_passed += sum(test.passed for test in result.tests)
        if self.problem or self.timeout or (self.stop_early and not passed):
            self.waiting = []

    def score(self, aggregate: str) -> Score:
        if self.problem:
            return self.problem
        share = self.num_passed / self.task.num_tests
        metrics = {"tests_passed": share, "timeout": float(self.timeout), "cpu_seconds": self.cpu_seconds}
        return Score(share if aggregate == "fraction" else float(share == 1.0), metrics=metrics)


def extract_code(completion: str) -> str:
    """The code in a completion, by the rule at the top of this file.

    Example: "Here:\n```python\nx = 1\n```\nIt prints:\n```\n1\n```" gives "x = 1\n".
    """
    last: dict[str, str] = {}  # the last complete block of each tag
    tag, opened = None, None
    start = end = 0
    for line in io.StringIO(completion, newline="\n"):  # in one pass, however many fences there are
        end += len(line)
        if not (fence := FENCE.match(line)):
            continue
        name = "python" if fence[1].lower() in PYTHON_TAGS else fence[1].lower()
        bare = not fence[2].strip(" \t\n")
        if bare and name in ("python", "") and line.endswith("\n"):
            opened = end
        if tag is None:
            tag, start = name, end
        elif bare and not name:
            last[tag] = completion[start : end - len(line)]
            tag = None
    for name in ("python", ""):
        if name in last:
            return last[name]
    return completion if opened is None else completion[opened:]


def _is_column(column: Any, size: int) -> bool:
    # What is no list of this length is one of TRL's extras (trainer_state, log_metric ...).
    return isinstance(column, Sequence) and not isinstance(column, str) and len(column) == size
