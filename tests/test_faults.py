"""What a run does when it is told to stop, when a rank dies or hangs, and when a reward's server is down.

Real processes, real signals, two ranks under DeepSpeed's launcher and under torchrun.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import closing
from pathlib import Path

import pytest

from rewards.run import RewardRunner
from rewards.score import TransientRewardError
from rewards.table import RewardPart
from rl.config import load_config
from rl.train.run import Run
from tests import runs

# Rank 1 misbehaves in its second call. Evaluations are judged by the task itself, so that call k is step k.
REWARD = """
import os, signal, time

calls = 0

def dense(prompts, completions, **columns):
    global calls
    calls += 1
    if os.environ.get("MISCHIEF") and (os.environ.get("RANK", "0"), calls) == ("1", 2):
        exec(os.environ["MISCHIEF"])
    return [sum((i + 1) * int(d) for i, d in enumerate(c) if d.isdigit()) / 500 for c in completions]
"""


def config(folder: Path, *overrides: str) -> list[str]:
    return runs.tiny_config(folder, "train.steps=6", *overrides, reward=REWARD)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one rank that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    runs.train_here(config(folder))
    return folder / "run"


def stopped_run(
    folder: Path, number: int, stage: str = "train", *overrides: str
) -> tuple[subprocess.Popen[str], list[str]]:
    """A run that gets a signal after the first step of a stage; its config has no checkpoints on the way."""
    arguments = config(folder, *overrides)
    process = subprocess.Popen(
        [sys.executable, "-m", "rl.cli", "train", *arguments],
        cwd=runs.ROOT, env=runs.clean_env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = folder / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.is_file() and f'"stage": "{stage}"' in metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(number)
    return process, arguments


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_the_run_goes_on(whole: Path, tmp_path: Path, number: int) -> None:
    process, _ = stopped_run(tmp_path, number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + number, stderr
    assert stderr.strip().startswith("Ctrl-C: the step is finished and saved" if number == signal.SIGINT else "")
    assert stderr.count("\n") == (2 if number == signal.SIGINT else 0)
    step = runs.lines(tmp_path / "run", "train")[-1]["step"]
    assert 0 < step < 6, "it ended before the signal came"
    said = " ".join(stdout.split())
    name, saved = signal.Signals(number).name, tmp_path / "run" / "config.yaml"
    command = f"denoise-rl train --config {saved} run.resume=true"
    assert f"{name}: stopped after step {step}, go on from its checkpoint with {command}" in said
    # The command that it names.
    runs.train_here(command.split()[2:])
    assert runs.lines(tmp_path / "run") == runs.lines(whole)
    assert runs.largest_difference(runs.weights(tmp_path / "run"), runs.weights(whole)) == 0.0


def test_ctrl_c_in_the_supervised_stage_loses_nothing(tmp_path: Path) -> None:
    stage = ["sft.steps=40", "train.steps=1"]
    process, arguments = stopped_run(tmp_path, signal.SIGINT, "sft", *stage)
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    (step,) = (int(path.name[5:]) for path in (tmp_path / "run" / "sft" / "checkpoints").glob("step_*"))
    assert 0 < step < 40 and f"SIGINT: stopped after step {step}" in " ".join(stdout.split())
    runs.train_here([*arguments, "run.resume=true"])
    assert [line["step"] for line in runs.lines(tmp_path / "run", "sft")] == list(range(1, 41))


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    """Two at once, as `srun -n 2` without a launcher starts them: the second ends before it writes. A kill unlocks."""
    arguments = config(tmp_path)
    with Run.open(load_config(arguments[1], arguments[2:])):
        before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        done = runs.cli("train", *arguments, "run.seed=1")
        assert done.returncode == 2
        assert f"run.output_dir '{tmp_path / 'run'}'" not in done.stderr
        assert done.stderr.strip() == f"denoise-rl: {tmp_path / 'run'} is being written by another process"
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    process, _ = stopped_run(tmp_path, signal.SIGKILL)
    process.communicate(timeout=120)
    with Run.open(load_config(arguments[1], arguments[2:])):
        pass


def test_a_rank_without_a_meeting_place_is_one_line(tmp_path: Path) -> None:
    for command in ("check", "train"):
        done = runs.cli(command, *config(tmp_path), RANK="0")
        assert done.returncode == 2
        assert "the environment sets RANK and not WORLD_SIZE and MASTER_ADDR and MASTER_PORT: use" in done.stderr
        assert done.stderr.count("\n") == 1


def test_sigterm_for_one_rank_stops_all(tmp_path: Path) -> None:
    """As DeepSpeed's launcher passes it on: to one rank, and to the next when that has ended."""
    mischief = "os.kill(os.getpid(), signal.SIGTERM)"
    done = runs.ranks(2, "scripts/train.py", *config(tmp_path), MISCHIEF=mischief)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert "SIGTERM: stopped after step 2" in " ".join(done.stdout.split())
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step_2"


def test_a_rank_that_dies_ends_the_run_with_its_own_exit_code(tmp_path: Path) -> None:
    """The others name a lost rank in one line, and leave the launcher the time to see who was first."""
    mischief = "print('the disk is full', file=__import__('sys').stderr, flush=True); os._exit(7)"
    done = runs.deepspeed(2, "scripts/train.py", *config(tmp_path), MISCHIEF=mischief)
    assert done.returncode == 7, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    cause, effect = done.stderr.index("the disk is full"), done.stderr.index("another rank ended or is stuck")
    assert cause < effect
    assert "denoise-rl: rank 0: another rank ended or is stuck" in done.stderr


def test_a_rank_that_hangs_ends_the_run_after_the_timeout(tmp_path: Path) -> None:
    arguments = config(tmp_path, "run.collective_timeout_seconds=8")
    done = runs.torchrun(2, "scripts/train.py", *arguments, MISCHIEF="time.sleep(3600)")
    assert done.returncode == 1
    assert "denoise-rl: rank 0: another rank ended or is stuck" in done.stderr
    assert "Timed out" in done.stderr


class Server(threading.Thread):
    """A port on which nobody listens until `up` is called; then it answers one request."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def up(self) -> None:
        self.socket.listen()
        self.start()

    def run(self) -> None:
        connection, _ = self.socket.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\n0.5")


def ask(prompts: list[str], completions: list[str], **columns: object) -> list[float]:
    try:
        with urllib.request.urlopen(os.environ["JUDGE"], timeout=5) as answer:
            return [float(answer.read())] * len(completions)
    except urllib.error.URLError as error:
        raise TransientRewardError(str(error)) from None


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_reward_server_that_is_down_is_waited_for(
    comes_back: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server()
    monkeypatch.setenv("JUDGE", server.url)
    seconds = 60.0 if comes_back else 0.3
    runner = RewardRunner(
        [RewardPart(f"{__file__}:ask")], max_failure_share=1.0, retries=1, retry_seconds=0.02, outage_seconds=seconds
    )
    with closing(server.socket), runner, caplog.at_level(logging.WARNING):
        if comes_back:
            threading.Timer(0.3, server.up).start()
        table = runner.score(["p"] * 3, ["c"] * 3)
    assert table.values == ([0.5] * 3 if comes_back else [None] * 3)
    assert caplog.messages == [f"a reward's server is down: waiting for it for up to {seconds:g} s"]
