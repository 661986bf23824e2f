"""Verdicts per second of the code sandbox, between the naive loop (slow, unsafe) and plain exec (fast, unsafe).

    python scripts/bench_sandbox.py --num-programs 200 --max-workers 2

The programs are two of the sizes that code rewards see: a function under three asserts, and a script that reads
standard input. Every way judges the same programs; half are wrong, and the verdicts are checked. Verdicts per second
are the best of `--repeats` rounds; CPU milliseconds per verdict are the mean of all, and suffer less from neighbours.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rewards.sandbox import CodeSandbox, Program, SandboxError
from rewards.sandbox.compare import outputs_match

FUNCTION = """
from typing import List

def close_elements(numbers: List[float], threshold: float) -> bool:
    for i, one in enumerate(numbers):
        for j, other in enumerate(numbers):
            if i != j and abs(one - other) < threshold:
                return {answer}
    return False
"""
TESTS = [
    "assert close_elements([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.3) == True",
    "assert close_elements([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.05) == False",
    "assert close_elements([1.1, 2.2, 3.1, 4.1, 5.1], 1.0) == True",
]
SCRIPT = "import sys\nvalues = list(map(int, sys.stdin.read().split()))\nprint(sum(values){wrong})\n"
STDIN, OUTPUT = "1 2 3 4 5\n" * 100, "1500"


def function_programs(count: int) -> list[Program]:
    """Every second one is wrong."""
    return [Program(FUNCTION.format(answer=i % 2 == 0), tests=TESTS) for i in range(count)]


def script_programs(count: int) -> list[Program]:
    """Every second one is wrong."""
    return [Program(SCRIPT.format(wrong=" + 1" * (i % 2)), stdin=STDIN) for i in range(count)]


def judge_in_process(program: Program) -> bool:
    """What exec alone costs: no isolation, no limit, one process."""
    space: dict[str, object] = {"__name__": "__main__"}
    if program.tests is None:
        written, source = io.StringIO(), sys.stdin
        sys.stdin = io.StringIO(program.stdin)
        try:
            with contextlib.redirect_stdout(written):
                exec(program.code, space)
        finally:
            sys.stdin = source
        return outputs_match(written.getvalue(), OUTPUT)
    try:
        exec(program.code, space)
        for test in program.tests:
            exec(test, space)
    except AssertionError:
        return False
    return True


def judge_by_subprocess(program: Program) -> bool:
    """The usual way: a new interpreter per program, whose exit code is believed."""
    code = "\n".join([program.code, *(program.tests or ())])
    done = subprocess.run([sys.executable, "-c", code], input=program.stdin, capture_output=True, text=True, timeout=60)
    return done.returncode == 0 if program.tests is not None else outputs_match(done.stdout, OUTPUT)


def judge_in_sandbox(sandbox: CodeSandbox, programs: Sequence[Program]) -> list[bool]:
    """The verdicts of one call."""
    results = sandbox.run(programs)
    return [
        result.passed if program.tests is not None else result.status == "ok" and outputs_match(result.stdout, OUTPUT)
        for program, result in zip(programs, results, strict=True)
    ]


def cpu_seconds() -> float:
    """CPU time so far of this process and of all its processes that have ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def measure(judge: Callable[[Sequence[Program]], list[bool]], programs: Sequence[Program], repeats: int) -> float:
    """Programs per second, best of `repeats`; a wrong verdict ends the benchmark."""
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        verdicts = judge(programs)
        best = max(best, len(programs) / (time.perf_counter() - start))
        if verdicts != [i % 2 == 0 for i in range(len(programs))]:
            raise SystemExit("wrong verdicts")
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-programs", type=int, default=200)
    parser.add_argument("--max-workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    workers = options.max_workers
    kinds = {"function": function_programs(options.num_programs), "script": script_programs(options.num_programs)}

    def show(name: str, make: Callable[[], contextlib.AbstractContextManager[Any]], cpu: bool = True) -> None:
        cells = []
        for programs in kinds.values():
            before = cpu_seconds()
            with make() as judge:
                judge(programs[: 2 * workers])
            start = cpu_seconds()
            with make() as judge:
                judge(programs[: 2 * workers])
                per_second = measure(judge, programs, options.repeats)
            spent = cpu_seconds() - start - (start - before)  # without starting and stopping
            cost = f"{1000 * spent / (len(programs) * options.repeats):.1f}" if cpu else "-"
            cells.append(f"{per_second:.0f} | {cost}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)

    @contextlib.contextmanager
    def by_subprocess() -> Iterator[Any]:
        with ThreadPoolExecutor(workers) as pool:
            yield lambda programs: list(pool.map(judge_by_subprocess, programs))

    @contextlib.contextmanager
    def by_sandbox(isolation: str) -> Iterator[Any]:
        with CodeSandbox(workers, isolation=isolation) as sandbox:
            sandbox.describe()
            yield lambda programs: judge_in_sandbox(sandbox, programs)

    columns = [f"{kind}: {unit}" for kind in kinds for unit in ("verdicts/s", "CPU ms")]
    print("| way | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    show(f"one interpreter per program, {workers} at once", by_subprocess)
    for isolation in ("bubblewrap", "process"):
        name = f"sandbox, {isolation}, {workers} workers"
        try:
            # What runs below bubblewrap is not accounted to us.
            show(name, functools.partial(by_sandbox, isolation), cpu=isolation != "bubblewrap")
        except SandboxError as error:
            print(f"| {name} | {error} |")
    show("exec in this process, no sandbox", lambda: contextlib.nullcontext(lambda ps: list(map(judge_in_process, ps))))


if __name__ == "__main__":
    main()
