"""The table of which recipe scores which decoder is what trying gives."""

from __future__ import annotations

from scripts.exactness_table import MARK, PAGE, table


def test_the_page_says_what_trying_gives() -> None:
    written = PAGE.read_text().split(MARK)[1].strip()
    assert written == table(), "run python scripts/exactness_table.py"
