"""scripts/gpu_check.py at its small sizes: every part runs, and the page gets one section per card."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from scripts import gpu_check
from tests import runs


def test_every_part_runs_and_the_page_gets_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tests on a device are run by this suite anyway; a part that fails is named and does not stop the others."""
    if torch.cuda.is_available():
        pytest.skip("sizes for a GPU: run scripts/gpu_check.sh")
    page = tmp_path / "gpu.md"
    page.write_text("# On a GPU\n\nText.\n\n## Card\n\n| old |\n\n## Other\n\n| kept |\n")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--write", str(page)])
    monkeypatch.chdir(runs.ROOT)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    monkeypatch.setattr(gpu_check, "device_tests", lambda: 1 / 0)
    assert gpu_check.main() == 1
    rows = dict(
        line[2:-2].split(" | ") for line in page.read_text().splitlines() if line.startswith("| ") and " | " in line
    )
    assert rows.pop("tests on the device") == "FAILED: ZeroDivisionError: division by zero"
    assert not [what for what, result in rows.items() if "FAILED" in result]
    for attention in ("full attention", "block attention"):
        assert "log-prob gap" in rows[f"RL step, {attention}"]
        assert "% of the matmul rate" in rows[f"{attention}: rollouts"] and "%" in rows[f"{attention}: update"]
    assert "log-prob gap" in rows["RL step, images"]
    gpu_check.write(page, "Card", ["| new |"])
    gpu_check.write(page, "Card", ["| newer |"])
    text = page.read_text()
    assert text.startswith("# On a GPU\n\nText.\n") and "| kept |" in text and text.count("## Card") == 1
    assert "| newer |" in text and "| new |" not in text and "| old |" not in text


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    monkeypatch.setattr(gpu_check, "NEEDED", {"torch", "no_such_package"})
    assert gpu_check.main() == 2
    assert "missing: no_such_package" in capsys.readouterr().out
    assert os.access(runs.ROOT / "scripts" / "gpu_check.sh", os.X_OK)
