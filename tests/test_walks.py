"""The walks of docs/architecture.md: the functions are where the page says, and there are no more than it promises."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()


def steps(title: str) -> list[tuple[str, str, str]]:
    """(function, file, the rest of its line) of a walk's table."""
    section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| \d+ \| `([\w.]+)` in `([\w/]+\.py)` \|(.*)$", section, flags=re.MULTILINE)


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    """Functions and methods of a file by `name` or `Class.name`."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
        found |= {prefix + member.name: member for member in members if isinstance(member, ast.FunctionDef)}
    return found


@pytest.mark.parametrize("title", ["From a reward to a gradient", "From a token's logits to the learner's log-prob"])
def test_every_function_is_where_the_page_says(title: str) -> None:
    walk = steps(title)
    assert len(walk) > 8
    for name, file, _ in walk:
        assert name in functions(ROOT / file), f"{file} has no {name}"


def test_a_reward_reaches_its_gradient_in_fourteen_functions_and_six_records() -> None:
    """Each function is called, or handed over, by one before it."""
    walk = steps("From a reward to a gradient")
    assert len(walk) == 14
    assert [line.rsplit("|", 2)[1].strip(" `") for _, _, line in walk if line.rsplit("|", 2)[1].strip()] == [
        "ScoredRollouts", "Verdicts", "MicroBatch", "Scores", "DecisionBatch", "LossOutput",
    ]  # fmt: skip
    bodies = [ast.unparse(functions(ROOT / file)[name]) for name, file, _ in walk]
    for index, (name, _, _) in enumerate(walk[2:], start=2):
        short = name.rpartition(".")[2]
        assert any(re.search(rf"\b{short}\b", body) for body in bodies[:index]), f"nothing before it names {name}"
