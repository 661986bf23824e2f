"""scripts/mutants.py: what it reads, what it refuses, what it plants, and that it tells bugs from equal code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import mutants
from tests import runs

LIST = """# comment
== area
toy_mutants/a.py: a
- return x + 1
+ return x + 2
- return y + 1
+ return 1 + y
= addition commutes
- y = 2 * x
+ y = x + x + 1
"""
SOURCE = "def f(x):\n    return x + 1\n\n\ndef g(y):\n    return y + 1\n\n\ndef h(x):\n    y = 2 * x\n    return y\n"
TEST = "from toy_mutants.a import f, g\n\n\ndef test_it():\n    assert f(1) == 2 and g(1) == 2\n"
# The script on another tree. It forks, which a process where torch has threads may not survive.
PROGRAM = """
import sys
from pathlib import Path
from scripts import mutants
tree = Path(sys.argv[1])
mutants.ROOT, mutants.COPIED = tree, ("toy_mutants", "tests", "pyproject.toml")
mutants.import_what_stays = lambda: None
sys.argv = ["mutants.py", "--jobs", "2", "--write", str(tree / "page.md")]
sys.exit(mutants.main())
"""


def script(tree: Path) -> tuple[int, str]:
    """Exit code and output of the script at work on a tree."""
    words = [sys.executable, "-c", PROGRAM, str(tree)]
    done = subprocess.run(words, env=runs.clean_env(), capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project of one module and one test."""
    for name, text in {
        "tests/mutants.txt": LIST, "tests/test_a.py": TEST, "toy_mutants/__init__.py": "", "toy_mutants/a.py": SOURCE,
        "pyproject.toml": "", "page.md": "",
    }.items():  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "page.md").write_text("Text.\n\n<!-- mutants -->\nold\n<!-- mutants -->\n\nMore.\n")
    return tmp_path


def test_every_bug_of_the_list_can_be_planted_today() -> None:
    assert not list(mutants.problems(mutants.read(mutants.ROOT / "tests/mutants.txt")))


def test_survivors_are_named_and_fail_the_run(tree: Path) -> None:
    code, said = script(tree)
    assert code == 1
    verdicts = {line[:10].strip(): line.split("s  ", 1)[1] for line in said.splitlines() if ".py: " in line}
    assert verdicts["noticed"] == "toy_mutants/a.py: return x + 1  ->  return x + 2"
    assert verdicts["equivalent"] == "toy_mutants/a.py: return y + 1  ->  return 1 + y"
    assert verdicts["SURVIVES"] == "toy_mutants/a.py: y = 2 * x  ->  y = x + x + 1"
    page = (tree / "page.md").read_text()
    assert "| area | 3 | 1 | 1 | 1 |" in page and "old" not in page and page.endswith("More.\n")


def test_a_line_that_is_gone_and_tests_that_fail_anyway_end_the_run(tree: Path) -> None:
    (tree / "tests" / "test_a.py").write_text(TEST.replace("== 2 and", "== 3 and"))
    code, said = script(tree)
    assert code == 1 and "without any bug these fail: tests/test_a.py" in said and "assert f(1) == 3" in said
    (tree / "toy_mutants" / "a.py").write_text(SOURCE.replace("y + 1", "1 + y"))
    code, said = script(tree)
    assert code == 1 and said == "stands 0 times in its file: toy_mutants/a.py: return y + 1  ->  return 1 + y\n"
