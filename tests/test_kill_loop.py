"""scripts/kill_loop.py, shorter: SIGKILL at a random point, once, and what its comparison would notice."""

from __future__ import annotations

import importlib.util
import os
import random
import shutil
from pathlib import Path

import pytest

from tests import runs

spec = importlib.util.spec_from_file_location("kill_loop", runs.ROOT / "scripts" / "kill_loop.py")
assert spec is not None and spec.loader is not None
kill_loop = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kill_loop)

SLOW = runs.REWARD.replace("**columns):\n", "**columns):\n    __import__('time').sleep(0.2)\n", 1)


def test_killed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = runs.clean_env()
    for name in {*os.environ} - {*env}:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    arguments = runs.tiny_config(tmp_path, "train.steps=8", reward=SLOW)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kill_loop.finish(kill_loop.train(arguments, whole))
    reached = kill_loop.kill_often(arguments, killed, 1, random.Random(1), 0.8)
    assert len(reached) == 1
    assert kill_loop.compare(whole, killed) == []
    broken = tmp_path / "broken"
    shutil.copytree(killed, broken)
    metrics = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken / "metrics.jsonl").write_text("".join([*metrics[:-2], metrics[-3], *metrics[-2:]]))
    (broken / "checkpoints" / "latest").write_text("step_7")
    problems = kill_loop.compare(whole, broken)
    assert [problem.split(":")[0].split(" from")[0] for problem in problems] == [
        "steps are lost or doubled", "metrics differ", "weights differ",
    ]  # fmt: skip
