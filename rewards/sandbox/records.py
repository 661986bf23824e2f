"""What goes into a sandbox and what comes out. Plain records, no behaviour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Status = Literal["ok", "error", "timeout", "output", "invalid", "infrastructure"]

LONGEST_RUN = 5  # times the wall limit, however busy the machine is


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    CPU time, not wall time, is the first limit: a verdict must not depend on how busy the machine is. Time in which a
    program could have run but others had the processors does not count as wall time.
    """

    cpu_seconds: float = 10.0  # of the program, all its threads; the checker gets the same
    wall_seconds: float | None = None  # for programs that sleep; None means 2 * cpu_seconds + 5
    memory_mb: int = 1024  # address space, MiB
    output_kb: int = 8192  # standard output, KiB; more of it stops the program, with the status "output"
    tmp_mb: int = 64  # the temporary folder, MiB
    max_threads: int = 32  # at once

    def __post_init__(self) -> None:
        for name in ("cpu_seconds", "wall_seconds", "memory_mb", "output_kb", "tmp_mb", "max_threads"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")

    @property
    def wall(self) -> float:
        """The wall limit in seconds, derived when not given."""
        return self.wall_seconds if self.wall_seconds is not None else 2 * self.cpu_seconds + 5


@dataclass(frozen=True)
class Program:
    """A program to run, either on standard input or under function tests.

    Examples: `Program("print(int(input()) + 1)", stdin="41")` and
    `Program("def f(x): return x + 1", tests=["assert f(1) == 2"])`.

    The tests run in another process than `code`, which sees nothing of them but the arguments of the calls they make.

    Attributes:
        preamble: what the task gives to every program and `code` begins with (imports, helper functions). With an
            `entry_point` the tests use these definitions, not what the program made of them. Ignored when it is no
            complete Python text.
        entry_point: name of the function under test. Needed with a `preamble`, and when it is also the name of a
            builtin and the tests use other functions of the program too.
    """

    code: str
    stdin: str = ""  # used when `tests` is None
    tests: Sequence[str] | None = None  # Python snippets, each of which raises when it fails
    setup: str = ""  # run before the first test, after `code`
    preamble: str = ""
    entry_point: str | None = None
    language: str = "python"  # others only in a remote sandbox, on standard input

    def __post_init__(self) -> None:
        if self.preamble and self.tests is not None and not self.entry_point:
            raise ValueError("a preamble needs entry_point, the name of the function that the program must define")


@dataclass(frozen=True)
class TestResult:
    """Verdict of one test; `reason` says why it failed."""

    __test__ = False  # not a pytest class

    passed: bool
    reason: str = ""


@dataclass(frozen=True)
class RunResult:
    """What happened to one program.

    Example: `RunResult("ok", tests=(TestResult(True),), cpu_seconds=0.004, wall_seconds=0.006)`.

    The status is "ok" (ran to its end), "error" (exception, non-zero exit, killed), "timeout", "output" (wrote too
    much), or no verdict: "invalid" (the tests are of no use) and "infrastructure" (the sandbox itself failed).
    """

    status: Status
    tests: tuple[TestResult, ...] = ()  # in order; none in standard-input mode
    stdout: str = ""  # undecodable bytes replaced
    stderr: str = ""
    exit_code: int | None = None  # negative for a signal; None when it was stopped or under tests
    reason: str = ""  # one line, for any status but "ok"
    cpu_seconds: float = 0.0  # 0 where it cannot be measured (remote)
    wall_seconds: float = 0.0

    @property
    def has_verdict(self) -> bool:
        """False when nothing can be said about the program."""
        return self.status not in ("invalid", "infrastructure")

    @property
    def passed(self) -> bool:
        """True when there were tests and every one passed."""
        return self.status == "ok" and bool(self.tests) and all(test.passed for test in self.tests)

    @staticmethod
    def from_message(message: Mapping[str, Any]) -> RunResult:
        """Build from the JSON object a worker sends."""
        tests = tuple(TestResult(bool(passed), str(reason)) for passed, reason in message.get("tests", ()))
        return RunResult(**{**message, "tests": tests})


@dataclass(frozen=True)
class SandboxReport:
    """Which isolation is in force, for the log.

    Example: `SandboxReport("process", layers=("seccomp", "Landlock", "resource limits"), missing=("no bubblewrap",))`.
    """

    isolation: str  # "bubblewrap", "process", "none" or "remote"
    layers: tuple[str, ...] = ()  # what holds a program, strongest first
    missing: tuple[str, ...] = ()  # one entry per protection that is not there, and why

    def __str__(self) -> str:
        weaker = f"; weaker: {'; '.join(self.missing)}" if self.missing else ""
        return f"code sandbox: {self.isolation}: {', '.join(self.layers)}{weaker}"
