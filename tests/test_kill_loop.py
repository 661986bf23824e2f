"""scripts/kill_loop.py, shorter: SIGKILL of a trainer, a rollout worker and a reward server at random points, once
each, and what its comparison would notice.
"""

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

# Asks the reward server, slowly enough for a kill to fall into a step.
ASKS = """
import time
from runpy import run_path

judged = run_path("SCRIPT")["judged"]

def dense(prompts, completions, **columns):
    time.sleep(0.2)
    return judged(prompts, completions)
""".replace("SCRIPT", str(runs.ROOT / "scripts" / "kill_loop.py"))


@pytest.mark.release
@pytest.mark.timeout(900)
def test_killed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = runs.clean_env()
    for name in {*os.environ} - {*env}:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KILL_LOOP_SERVER", "")
    arguments = runs.tiny_config(tmp_path, "train.steps=8", "reward.outage_seconds=200", reward=ASKS)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    server = kill_loop.RewardServer()
    try:
        kill_loop.finish(kill_loop.train(arguments, whole), whole)
        reached = kill_loop.kill_often(arguments, killed, 1, random.Random(1), 0.8)
        assert [victim for victim, _ in reached] == ["trainer"]
        assert kill_loop.compare(whole, killed) == []
        # One worker has the batches of the learner's own process, and so its numbers; only it logs a lag.
        monkeypatch.setattr(kill_loop, "FAULTS", (*kill_loop.FAULTS, "rollout/lag"))
        workers = [*arguments, "rollout.engine=ray", "rollout.ray.workers=1"]
        folder, draw = tmp_path / "workers", random.Random(4)
        reached = kill_loop.kill_often(workers, folder, 2, draw, 0.8, ["server", "worker"], server)
        assert [victim for victim, _ in reached] == ["server", "worker"]
        assert kill_loop.compare(whole, folder) == []
        assert sum(runs.series(folder, "train", "rollout/workers_lost")) == 1
        assert sum(runs.series(folder, "train", "reward/dense/retries")) >= 1
    finally:
        server.close()
    broken = tmp_path / "broken"
    shutil.copytree(killed, broken)
    metrics = (broken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (broken / "metrics.jsonl").write_text("".join([*metrics[:-2], metrics[-3], *metrics[-2:]]))
    (broken / "checkpoints" / "latest").write_text("step_7")
    problems = kill_loop.compare(whole, broken)
    assert [problem.split(":")[0].split(" from")[0] for problem in problems] == [
        "steps are lost or doubled", "metrics differ", "weights differ",
    ]  # fmt: skip
