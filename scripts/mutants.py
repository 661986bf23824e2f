"""Plant the bugs of tests/mutants.txt one at a time, run the tests that should notice, and say which bugs survive.

    python scripts/mutants.py                        # all of them (make mutants)
    python scripts/mutants.py --only sampler --jobs 2
    python scripts/mutants.py --write docs/testing.md

Each bug replaces one line of one file in a copy of the tree. One process imports torch and all that does not change,
and forks for every bug, so a bug costs little more than the tests up to the first that fails. A bug whose line is gone
from its file ends the run before anything is planted, so the list stays alive.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("rl", "rewards", "rollouts", "tests", "configs", "scripts", "docs")
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
COPIED = (*FOLDERS, *PAGES, "pyproject.toml", "constraints.txt", "Makefile", "Dockerfile", "LICENSE", "CITATION.cff")
LIMIT = 600  # seconds after which a bug that hangs the tests counts as noticed


@dataclass
class Mutant:
    """A planted bug. `tests` are the files to run, cheapest first; `equivalent` says why nothing can notice it."""

    section: str
    file: str
    tests: list[str]
    old: str
    new: str
    equivalent: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.old}  ->  {self.new}"


def read(path: Path) -> list[Mutant]:
    """Lines `== section`, `file: tests`, `- old line`, `+ new line`, `= why it is equivalent`; `#` is a comment."""
    mutants: list[Mutant] = []
    section = file = old = ""
    tests: list[str] = []
    for line in path.read_text().splitlines():
        mark, _, rest = line.partition(" ")
        if mark == "==":
            section = rest
        elif mark == "-":
            old = rest
        elif mark == "+":
            mutants.append(Mutant(section, file, tests, old, rest))
        elif mark == "=":
            mutants[-1].equivalent = rest
        elif line and mark != "#":
            file, tests = mark.removesuffix(":"), [f"tests/test_{name}.py" for name in rest.split()]
    return mutants


def problems(mutants: list[Mutant]) -> Iterator[str]:
    """One line for every bug that cannot be planted."""
    for mutant in mutants:
        lines = [line.strip() for line in (ROOT / mutant.file).read_text().splitlines()]
        if lines.count(mutant.old) != 1:
            yield f"stands {lines.count(mutant.old)} times in its file: {mutant}"
        yield from (f"no test file {name}: {mutant}" for name in mutant.tests if not (ROOT / name).is_file())


def planted(tree: Path, mutant: Mutant) -> None:
    path = tree / mutant.file
    pattern = re.compile(rf"^( *){re.escape(mutant.old)}$", re.MULTILINE)
    path.write_text(pattern.sub(lambda match: match[1] + mutant.new, path.read_text()))


def start(tests: list[str], mutant: Mutant | None) -> tuple[int, Path]:
    """Fork a child that runs `tests` in a copy of the tree, with the bug in it; its process and the folder."""
    tree = Path(tempfile.mkdtemp(prefix="mutant-"))
    for name in (name for name in COPIED if (ROOT / name).exists()):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name)
        else:
            shutil.copy2(ROOT / name, tree / name)
    if mutant is not None:
        planted(tree, mutant)
    child = os.fork()
    if child:
        return child, tree
    os.setsid()
    os.chdir(tree)
    output = os.open("output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # Ours come from the copy, wherever an editable install would take them from.
    sys.meta_path[:] = [finder for finder in sys.meta_path if "Redirecting" not in getattr(finder, "__name__", "")]
    sys.path.insert(0, str(tree))
    import pytest

    options = ["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={tree / 'tmp'}"]
    code = pytest.main([*options, *tests])
    sys.stdout.flush()
    os._exit(int(code))


def run(jobs: dict[str, tuple[list[str], Mutant | None]], parallel: int) -> Iterator[tuple[str, int, float, str]]:
    """Name, exit code, seconds and output of every job, as they end."""
    waiting, running = list(jobs.items()), {}
    while waiting or running:
        while waiting and len(running) < parallel:
            name, (tests, mutant) = waiting.pop(0)
            child, tree = start(tests, mutant)
            running[child] = (name, tree, time.monotonic())
        ended = {child for child in running if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)}
        late = {child for child, (_, _, started) in running.items() if time.monotonic() - started > LIMIT}
        for child in ended | late:
            name, tree, started = running.pop(child)
            os.killpg(child, signal.SIGKILL)  # and whatever its tests left running
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            text = (tree / "output").read_text(errors="replace")
            shutil.rmtree(tree, ignore_errors=True)
            yield name, code, time.monotonic() - started, text
        time.sleep(0.05)


def import_what_stays() -> None:
    """Import what all copies share: none of it may be our own, or register what a child imports again."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    torch.set_num_threads(1)
    assert not {"rl", "rewards", "rollouts"} & sys.modules.keys()


def table(mutants: list[Mutant], alive: list[Mutant], minutes: float) -> list[str]:
    lines = ["| area | planted | noticed | shown equivalent | survive |", "|---|---|---|---|---|"]
    for section in dict.fromkeys(mutant.section for mutant in mutants):
        own = [mutant for mutant in mutants if mutant.section == section]
        left = [mutant for mutant in own if mutant in alive]
        equal = sum(bool(mutant.equivalent) for mutant in left)
        lines.append(f"| {section} | {len(own)} | {len(own) - len(left)} | {equal} | {len(left) - equal} |")
    noticed = len(mutants) - len(alive)
    return [*lines, "", f"{noticed} of {len(mutants)} noticed, in {minutes:.0f} minutes."]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="sections or files whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="bugs at a time")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    args = parser.parse_args()
    every = read(ROOT / "tests" / "mutants.txt")
    mutants = [mutant for mutant in every if args.only in mutant.section or args.only in mutant.file]
    if found := list(problems(every)):
        print("\n".join(found))
        return 1
    import_what_stays()
    started = time.monotonic()
    whole = {name: ([name], None) for m in mutants for name in m.tests}
    broken = [(name, text) for name, code, _, text in run(whole, args.jobs) if code]
    if broken:
        print("\n".join(f"without any bug these fail: {name}\n{text[-3000:]}" for name, text in broken))
        return 1
    named = {f"{index}": mutant for index, mutant in enumerate(mutants)}
    alive = []
    for name, code, seconds, _ in run({n: (m.tests, m) for n, m in named.items()}, args.jobs):
        mutant = named[name]
        verdict = "noticed" if code else "equivalent" if mutant.equivalent else "SURVIVES"
        print(f"{verdict:10} {seconds:5.0f} s  {mutant}", flush=True)
        if not code:
            alive.append(mutant)
    lines = table(mutants, alive, (time.monotonic() - started) / 60)
    print("\n" + "\n".join(lines))
    if args.write:
        text = args.write.read_text()
        parts = re.split(r"(<!-- mutants -->\n)", text)
        assert len(parts) == 5, f"{args.write} needs two lines <!-- mutants --> around the table"
        args.write.write_text("".join([*parts[:2], "\n" + "\n".join(lines) + "\n", *parts[3:]]))
    return 1 if any(not mutant.equivalent for mutant in alive) else 0


if __name__ == "__main__":
    sys.exit(main())
