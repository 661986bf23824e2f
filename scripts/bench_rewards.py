"""Verdicts per second of the math reward: in-process, through the runner, and one process per call.

    python scripts/bench_rewards.py --items 2000 --workers 2

The items are made here: half plain numbers (as GSM8K), half LaTeX (as MATH), all different, half of them right.
`math-verify in-process` calls that library as its documentation shows, for comparison.
`one process per call` is the naive way to be safe from hangs. Code rewards have a benchmark of their own.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import time
from collections.abc import Callable

from rewards import RewardPart, RewardRunner, load_reward

ONE_CALL = """
import sys
from math_verify import parse, verify
sys.exit(0 if verify(parse(sys.argv[1]), parse(sys.argv[2])) else 1)
"""


def make_items(count: int, seed: int) -> tuple[list[str], list[str], list[bool]]:
    """Reference answers, completions, and whether each completion is right."""
    chance = random.Random(seed)
    golds, completions, labels = [], [], []
    for number in range(count):
        right = chance.random() < 0.5
        a, b = chance.randint(2, 999), chance.randint(2, 99)
        off = 0 if right else 1
        if number % 2:
            gold, answer = f"{a * b}", f"#### {a * b + off}"
        else:
            form = chance.randrange(4)
            if form == 0:
                gold, answer = rf"\frac{{{a}}}{{{b}}}", rf"\boxed{{\frac{{{2 * a + off}}}{{{2 * b}}}}}"
            elif form == 1:
                gold, answer = rf"{a}\sqrt{{{b}}}", rf"\boxed{{\sqrt{{{b}}} \cdot {a + off}}}"
            elif form == 2:
                gold, answer = f"({a}, {b})", rf"\boxed{{\left({a}, {b + off}\right)}}"
            else:
                gold, answer = f"x^2 - {a}x + {b}", rf"\boxed{{{b + off} - {a}x + x^2}}"
        golds.append(gold)
        completions.append(f"Let me think about number {number}.\n{answer}")
        labels.append(right)
    return golds, completions, labels


def library(golds: list[str], completions: list[str]) -> list[bool]:
    """math-verify in this process, as its documentation shows it."""
    from math_verify import parse, verify

    return [verify(parse(f"${gold}$"), parse(text)) for gold, text in zip(golds, completions, strict=True)]


def one_process_per_call(golds: list[str], completions: list[str]) -> list[bool]:
    """A fresh interpreter for every verdict."""
    pairs = zip(golds, completions, strict=True)
    return [subprocess.run([sys.executable, "-c", ONE_CALL, f"${gold}$", text]).returncode == 0 for gold, text in pairs]


def report(name: str, judge: Callable[[list[str], list[str]], list[bool]], count: int, seed: int) -> None:
    """Judge fresh items once; print verdicts per second and how many verdicts agree with the labels."""
    golds, completions, labels = make_items(count, seed)
    start = time.perf_counter()
    verdicts = judge(golds, completions)
    seconds = time.perf_counter() - start
    agree = sum(verdict == label for verdict, label in zip(verdicts, labels, strict=True))
    print(f"{name:<44}{count / seconds:>10.1f} verdicts/s   {agree}/{count} as labelled", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=2000, help="verdicts per measurement")
    parser.add_argument("--workers", type=int, default=2, help="reward processes")
    parser.add_argument("--naive-items", type=int, default=10, help="verdicts of the slow baseline")
    options = parser.parse_args()

    reward = load_reward("math_answer")
    report("math-verify in-process", library, options.items, seed=1)

    def plain(golds: list[str], completions: list[str]) -> list[bool]:
        scores = reward(prompts=[""] * len(golds), completions=completions, answer=golds)
        return [float(score) == 1.0 for score in scores]  # type: ignore[arg-type]

    report("math_answer in-process, no runner", plain, options.items, seed=2)
    for seed, (mode, workers) in enumerate([("inline", 1), ("process", 1), ("process", options.workers)], start=3):
        with RewardRunner([RewardPart("math_answer")], mode=mode, num_workers=workers) as runner:

            def run(golds: list[str], completions: list[str], runner: RewardRunner = runner) -> list[bool]:
                table = runner.score([""] * len(golds), completions, {"answer": golds})
                return [value == 1.0 for value in table.values]

            report(f"runner, mode={mode}, {workers} worker(s)", run, options.items, seed)
    report("one process per call", one_process_per_call, options.naive_items, seed=9)


if __name__ == "__main__":
    main()
