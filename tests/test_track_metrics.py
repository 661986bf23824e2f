"""metrics.jsonl, its services, and the progress display, each through the real thing."""

import ast
import json
import logging
import math
import os
import pty
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rl.track.callbacks import Callbacks
from rl.track.jsonl import MetricsWriter, read_metrics
from rl.track.progress import Progress
from rl.track.services import Service, open_services
from tests import runs

ROOT = Path(__file__).parent.parent


def test_a_line_is_plain_json_with_step_stage_and_time(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run") as metrics:
        metrics.log(3, "train", {"reward/mean": np.float32(0.5), "cost/updates": 7})
        # Line buffered: the step is on disk while the writer is still open.
        line = (tmp_path / "run" / "metrics.jsonl").read_text()
    record = json.loads(line)
    assert list(record) == ["step", "stage", "time", "reward/mean", "cost/updates"]
    assert (record["step"], record["stage"], record["reward/mean"], record["cost/updates"]) == (3, "train", 0.5, 7)
    assert isinstance(record["cost/updates"], int)


def test_numbers_that_are_not_finite_become_null_and_are_counted(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as metrics:
        metrics.log(0, "train", {"a": math.nan, "b": -math.inf, "c": 1.0})
        metrics.log(1, "train", {"c": 1.0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    first, second = read_metrics(tmp_path)
    assert (first["a"], first["b"], first["c"], first["warnings/non_finite"]) == (None, None, 1.0, 2)
    assert "warnings/non_finite" not in second


@pytest.mark.parametrize("metrics", [{"step": 1.0}, {"a": "0.5"}, {"a": [1.0, 2.0]}, {"a": None}])
def test_what_is_no_metric_is_refused_and_nothing_is_written(tmp_path: Path, metrics: dict) -> None:
    with MetricsWriter(tmp_path) as writer, pytest.raises(ValueError, match=r"metric '(step|a)'"):
        writer.log(0, "train", metrics)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run", rank=1) as metrics:
        metrics.log(0, "train", {"a": 1.0})
        assert metrics.truncate_after(0) == 0
    assert not (tmp_path / "run").exists()


def test_resume_drops_later_lines_of_the_given_stages_only(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as metrics:
        for step in range(4):
            metrics.log(step * 10, "sft", {"a": step})
        for step in range(4):
            metrics.log(step, "train", {"a": step})
        metrics.log(3, "eval", {"a": 3})
    with MetricsWriter(tmp_path) as metrics:
        assert metrics.truncate_after(1, "train") == 2
        assert metrics.truncate_after(1) == 1  # train and eval: only the eval line was left to drop
        metrics.log(2, "train", {"a": 20})
    lines = [(record["stage"], record["step"], record["a"]) for record in read_metrics(tmp_path)]
    assert lines == [("sft", s * 10, s) for s in range(4)] + [("train", 0, 0), ("train", 1, 1), ("train", 2, 20)]
    assert [record["step"] for record in read_metrics(tmp_path, "train")] == [0, 1, 2]


def test_a_killed_run_loses_at_most_its_torn_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path) as metrics:
        metrics.log(0, "train", {"a": 1.0})
    path.write_text(path.read_text() + '{"step": 1, "stage": "tr')
    assert [record["step"] for record in read_metrics(tmp_path)] == [0]
    with MetricsWriter(tmp_path) as metrics:
        metrics.log(1, "train", {"a": 2.0})
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1]
    assert [message for message in caplog.messages if "incomplete" in message and str(path) in message]


def test_reading_what_is_not_there_or_damaged_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl; give the folder of a run"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "stage": "train"}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_metrics(tmp_path)


def test_tensorboard_holds_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with MetricsWriter(tmp_path, callbacks=Callbacks(services=open_services(["tensorboard"], tmp_path))) as metrics:
        metrics.log(4, "train", {"reward/mean": 0.25, "bad": math.nan})
        metrics.log(5, "train", {"reward/mean": 0.75})
        metrics.log(5, "eval", {"eval/accuracy@4": 0.5})
    # The reader warns about NumPy aliases in some versions; a process of its own keeps that out of this one.
    script = """
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1]); events.Reload()
print(sorted((tag, [(e.step, e.value) for e in events.Scalars(tag)]) for tag in events.Tags()["scalars"]))
"""
    folder = str(tmp_path / "tensorboard")
    result = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert ast.literal_eval(result.stdout) == [
        ("eval/accuracy@4", [(5, 0.5)]),
        ("train/reward/mean", [(4, 0.25), (5, 0.75)]),
        ("train/warnings/non_finite", [(4, 1.0)]),
    ]


def test_after_a_resume_tensorboard_holds_every_step_once(tmp_path: Path) -> None:
    """Raw events: steps 3 and 4 are logged again; a later step of another stage stays."""
    pytest.importorskip("tensorboard")
    for first in (1, 3):
        with MetricsWriter(tmp_path, callbacks=Callbacks(services=open_services(["tensorboard"], tmp_path))) as metrics:
            if first == 1:
                metrics.log(9, "sft", {"loss": 1.5})
            else:
                metrics.truncate_after(2)
            for step in range(first, 5):
                metrics.log(step, "train", {"reward/mean": step / 4})
    script = """
import sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1], purge_orphaned_data=False); events.Reload()
print(sorted((tag, [(e.step, e.value) for e in events.Scalars(tag)]) for tag in events.Tags()["scalars"]))
"""
    folder = str(tmp_path / "tensorboard")
    result = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert ast.literal_eval(result.stdout) == [
        ("sft/loss", [(9, 1.5)]),
        ("train/reward/mean", [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]),
    ]


def test_a_resumed_run_is_the_same_run_in_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict] = []

    class Stub:
        @staticmethod
        def init(**options: object) -> object:
            calls.append(options)
            return Stub()

        def define_metric(self, *_: object, **__: object) -> None: ...

        def log(self, line: dict) -> None: ...

        def finish(self) -> None: ...

    monkeypatch.setitem(sys.modules, "wandb", Stub)
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        with MetricsWriter(folder, callbacks=Callbacks(services=open_services(["wandb"], folder))) as metrics:
            metrics.truncate_after(0)
            metrics.log(1, "train", {"a": 1.0})
            assert not metrics.callbacks.services[0].failures
    assert calls[0]["id"] == calls[1]["id"] != calls[2]["id"] and {call["resume"] for call in calls} == {"allow"}


def test_a_full_disk_is_said_with_the_file(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path)
    metrics.log(1, "train", {"a": 1.0})
    with runs.files_of_at_most(100), pytest.raises(OSError, match=r"File too large: '.*metrics\.jsonl'"):
        for step in range(2, 9):
            metrics.log(step, "train", {"a": 1.0})
    metrics.close()
    with MetricsWriter(tmp_path) as again:
        again.log(9, "train", {"a": 1.0})
    assert [line["step"] for line in read_metrics(tmp_path)][:: len(read_metrics(tmp_path)) - 1] == [1, 9]


def test_a_service_that_breaks_is_said_once_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class FullDisk:
        def log(self, step: int, stage: str, metrics: dict) -> None:
            raise OSError("no space left")

        def close(self) -> None:
            raise OSError("still no space")

    def refused() -> FullDisk:
        raise ConnectionError("no route")

    services = [Service("full", FullDisk), Service("unreachable", refused)]
    with MetricsWriter(tmp_path, callbacks=Callbacks(services=services)) as metrics:
        for step in range(3):
            metrics.log(step, "train", {"a": step})
    records = read_metrics(tmp_path)
    assert [record["a"] for record in records] == [0, 1, 2]
    assert [record.get("warnings/full_failures") for record in records] == [None, 1, 2]
    assert [record.get("warnings/unreachable_failures") for record in records] == [1, 2, 3]
    assert [service.failures for service in services] == [4, 4]
    assert len([message for message in caplog.messages if message.startswith("full failed (OSError: no space")]) == 1
    assert len([message for message in caplog.messages if message.startswith("unreachable failed")]) == 1
    assert {record.levelno for record in caplog.records} == {logging.WARNING}


def test_a_service_that_is_not_there_is_an_error_that_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ValueError, match=r"run\.services: unknown service 'wand'; choose from mlflow, tensorboard, trackio"
    ):
        open_services(["wand"], tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python itself does for a module that cannot be imported
    with pytest.raises(ValueError, match=r"pip install 'denoise-rl\[wandb\]'"):
        open_services(["wandb"], tmp_path)


def test_progress_without_a_terminal_prints_a_plain_line_every_interval(capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    with Progress(interval=10, clock=lambda: now) as progress:
        progress.stage("train", 8)
        for step in range(1, 8):
            now += 4
            progress.update(step, reward=step / 10, tokens_per_s=12_345.6)
        progress.message("kept [as] written")
    assert capsys.readouterr().out.splitlines() == [
        "[train] started, 8 steps",
        "[train] 3/8  reward 0.300  12,346 tokens/s  elapsed 0:12  left 0:20",
        "[train] 6/8  reward 0.600  12,346 tokens/s  elapsed 0:24  left 0:08",
        "kept [as] written",
        "[train] 7/8  reward 0.700  12,346 tokens/s  elapsed 0:28  left 0:04",
    ]


def test_speed_is_shown_in_its_own_unit(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(clock=lambda: 0.0) as progress:
        progress.stage("train", None)
        progress.update(1, samples_per_s=3.456)
    assert "3.46 samples/s" in capsys.readouterr().out


def test_time_left_forgets_a_slow_start(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with Progress(interval=1e9, clock=lambda: now) as progress:
        progress.stage("train", 1000)
        now += 3600  # compiling
        progress.update(1)
        for step in range(2, 101):
            now += 2
            progress.update(step)
    assert capsys.readouterr().out.splitlines()[-1] == "[train] 100/1000  elapsed 1:03:18  left 30:00"


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(enabled=False) as progress:
        progress.stage("train", 2)
        progress.update(1, reward=0.5)
        progress.message("hello")
    assert capsys.readouterr().out == ""


def test_progress_on_a_terminal_updates_in_place_and_survives_an_error() -> None:
    script = """
import time
from rl.track.progress import Progress
with Progress() as progress:
    progress.stage("sft", 2)
    progress.update(2, loss=0.5)
    progress.stage("train", 9)
    for step in range(3):
        progress.update(step + 1, reward=0.1 * step, tokens_per_s=1000)
        time.sleep(0.3)
    progress.message("a line that stays")
    raise RuntimeError("boom")
"""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=theirs, stderr=subprocess.PIPE, stdin=theirs, env=environment
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux reports the far end's closing this way
            break
        if not part:
            break
        shown += part
    os.close(ours)
    _, error = process.communicate(timeout=60)
    text = shown.decode()
    assert "boom" in error.decode()
    assert "\x1b[1A" in text, "the display never moved the cursor up: it does not update in place"
    final = text[text.rindex("a line that stays") :]
    assert "3/9" in final and "reward 0.200" in final and "1,000 tokens/s" in final and "2/2" in final
    assert text.rstrip().endswith("\x1b[?25h"), "the cursor stays hidden"
