"""The pages under docs/ say what is true: the options are the code's, links lead somewhere, commands run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md")), ROOT / "rewards" / "README.md"]


def test_the_reference_of_options_is_up_to_date() -> None:
    written = (ROOT / "docs" / "options.md").read_text("utf-8")
    assert written == runpy.run_path(str(ROOT / "scripts" / "options_page.py"))["options_page"](), "run make options"
    assert "| `train.group_size` | `8` | integer, >= 1, <= 1024 | Rollouts per prompt. |" in written


def anchors(page: Path) -> set[str]:
    """Of every heading of a page, what GitHub and the site make of it: "Will it fit?" is will-it-fit."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        found = (page.parent / path) if path else page
        assert found.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{page.name}: no heading for {target}"
