"""A run that was killed goes on as if nothing had happened: same metrics, same weights, bit for bit.

The kill is real: a reward sends SIGKILL to its own process in the middle of a step. Float32 on CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rl.models.diffusion_lm import DiffusionLM, DiffusionLMConfig
from rl.run_folder import find_checkpoint, incomplete
from rl.tasks.base import Example
from rl.tasks.char_tokenizer import char_tokenizer
from rl.tasks.sudoku import SudokuTask
from tests import runs

STEPS = ["train.steps=6", "checkpoint.every=2", "checkpoint.keep=3", "train.optimizer.schedule=cosine", "eval.every=3"]

# Rollouts are rewarded once a step; evaluation is judged by the task itself.
KILLER = """
import os, signal

calls = 0

def dense(prompts, completions, **columns):
    global calls
    calls += 1
    if calls == int(os.environ.get("DIE_AT_CALL", "-1")):
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum((i + 1) * int(d) for i, d in enumerate(c) if d.isdigit()) / 500 for c in completions]
"""


def config(folder: Path) -> list[str]:
    return runs.tiny_config(folder, *STEPS, reward=KILLER)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    runs.train_here(config(folder))
    return folder / "run"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, killed in its step 6: checkpoints 2 and 4 are complete, step 5 is logged."""
    folder = tmp_path_factory.mktemp("killed")
    done = runs.cli("train", *config(folder), DIE_AT_CALL="6")
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert runs.series(folder / "run", "train", "cost/updates")[-1] == 10
    return folder / "run"


def copy(killed: Path, folder: Path) -> tuple[Path, list[str]]:
    """A copy of a killed run, to be damaged, and the arguments that resume it."""
    shutil.copytree(killed, folder / "run")
    return folder / "run", runs.resumed_config(folder, ["--config", str(killed.parent / "config.yaml"), *STEPS])


class Deadly(SudokuTask):
    """Ends a process that asks for the rows of a certain step."""

    def train_examples(self, seed: int, step: int, count: int) -> list[Example]:
        if step == int(os.environ.get("DIE_AT_STEP", "-1")):
            raise KeyboardInterrupt
        return super().train_examples(seed, step, count)


def test_a_supervised_stage_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its fifth update: checkpoint 4 is complete, 2 was dropped, nothing of the fifth is left."""
    stage = ["sft.steps=6", "sft.checkpoint_every=2", "checkpoint.keep=1", "train.steps=0", "eval.viewer_items=0",
             "sft.optimizer.schedule=cosine", "task.name=tests.test_resume:Deadly"]  # fmt: skip
    runs.train_here(runs.tiny_config(tmp_path / "whole", *stage))
    stopped = runs.tiny_config(tmp_path / "stopped", *stage)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setenv("DIE_AT_STEP", "4")
        runs.train_here(stopped)
    run = tmp_path / "stopped" / "run"
    assert [path.name for path in (run / "sft" / "checkpoints").glob("step_*")] == ["step_4"]
    runs.train_here([*stopped, "run.resume=true"])
    assert runs.lines(run) == runs.lines(tmp_path / "whole" / "run")
    files = [tmp_path / name / "run" / "warm_start" / "model.safetensors" for name in ("whole", "stopped")]
    assert runs.largest_difference(*map(runs.load_file, files)) == 0.0


def same(run: Path, whole: Path) -> None:
    assert runs.lines(run) == runs.lines(whole)
    assert runs.largest_difference(runs.weights(run), runs.weights(whole)) == 0.0
    for name in ("before", "after", "train_steps", "updates", "reward_queries"):
        summaries = [json.loads((folder / "summary.json").read_text())[name] for folder in (run, whole)]
        assert summaries[0] == summaries[1], name


def test_a_killed_run_goes_on(killed: Path, whole: Path, tmp_path: Path) -> None:
    run, arguments = copy(killed, tmp_path)
    assert not (run / "summary.json").exists()
    runs.train_here(arguments)
    same(run, whole)
    assert (run / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_line(
    killed: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file cut short in step_4, and a step_6 whose writing was interrupted: the run goes on from step 2."""
    run, arguments = copy(killed, tmp_path)
    weights = run / "checkpoints" / "step_4" / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    shutil.copytree(run / "checkpoints" / "step_2", run / "checkpoints" / "step_6")
    (run / "checkpoints" / "step_6" / "complete.json").unlink()
    # A torn last line is what a kill during a write leaves.
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "stage": "tra')
    runs.train_here(arguments)
    said = " ".join(capsys.readouterr().out.split())
    assert "step_6 is passed over: complete.json is missing" in said
    size = (whole / "checkpoints" / "step_4" / "hf" / "model.safetensors").stat().st_size
    assert f"step_4 is passed over: hf/model.safetensors has {size - 4} bytes instead of {size}" in said
    assert f"resumed from {run / 'checkpoints' / 'step_2'}" in said
    same(run, whole)


def test_the_newest_checkpoint_is_the_one_of_the_largest_step(tmp_path: Path) -> None:
    for step in (9, 10):
        folder = tmp_path / "checkpoints" / f"step_{step}"
        folder.mkdir(parents=True)
        (folder / "complete.json").write_text('{"files": {}}')
    assert find_checkpoint(tmp_path) == (tmp_path / "checkpoints" / "step_10", [])


def test_a_run_killed_before_its_first_step_goes_on_from_its_warm_start(whole: Path, tmp_path: Path) -> None:
    arguments = config(tmp_path)
    assert runs.cli("train", *arguments, DIE_AT_CALL="1").returncode == -signal.SIGKILL
    assert [line["stage"] for line in runs.lines(tmp_path / "run")] == ["sft", "sft", "eval"]
    runs.train_here([*arguments, "run.resume=true"])
    same(tmp_path / "run", whole)


def test_steps_that_no_checkpoint_continues_are_not_deleted(tmp_path: Path) -> None:
    """Killed in step 2, before the checkpoint of step 2: starting over would delete step 1."""
    arguments = config(tmp_path)
    assert runs.cli("train", *arguments, DIE_AT_CALL="2").returncode == -signal.SIGKILL
    assert find_checkpoint(tmp_path / "run") == (None, [])
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="has metrics and no complete checkpoint to go on from: choose another"):
        runs.train_here([*arguments, "run.resume=true"])
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    """The same path, another content: of the training file, and of a file that a reward reads."""
    rows = [json.dumps({"prompt": f"{i}+1="}) + "\n" for i in range(8)]
    data, words = tmp_path / "data.jsonl", tmp_path / "words.txt"
    data.write_text("".join(rows))
    words.write_text("one")
    char_tokenizer("0123456789+=").save_pretrained(tmp_path / "tok")
    reward = {"name": f"{tmp_path / 'reward.py'}:dense", "params": {"words": str(words)}}
    task = {"name": "jsonl", "params": {"train": str(data), "heldout": str(data)}}
    arguments = runs.tiny_config(
        tmp_path, "sft.steps=0", "train.steps=1", f"task={json.dumps(task)}", f"model.tokenizer={tmp_path / 'tok'}",
        f"reward.functions=[{json.dumps(reward)}]",
        reward="def dense(prompts, completions, words, **columns): return [float(len(set(c))) for c in completions]",
    )  # fmt: skip
    runs.train_here(arguments)
    again = [*arguments, "run.resume=true", "train.steps=2"]
    for path, key in ((data, "task.params.train"), (words, "reward.functions.0.params.words")):
        old = path.read_text()
        path.write_text(old + "\n")
        with pytest.raises(ValueError, match=f"{path.name} .{key}. is not the file that the run in .* began with"):
            runs.train_here(again)
        path.write_text(old)
    runs.train_here(again)
    assert [line["step"] for line in runs.lines(tmp_path / "run", "train")] == [1, 2]


def test_another_run_is_not_resumed(killed: Path, tmp_path: Path) -> None:
    """A changed setting would make a run that nobody configured; how long it runs may change."""
    _, arguments = copy(killed, tmp_path)
    with pytest.raises(ValueError, match=r"train.group_size is 4 and the run in .* began with 2: set it back"):
        runs.train_here([*arguments, "train.group_size=4"])
    with pytest.raises(ValueError, match=r"rollout.cache is 'prefix' and the run in .* began with 'none': set it back"):
        runs.train_here([*arguments, "rollout.cache=prefix"])


def test_old_checkpoints_are_dropped_and_latest_is_written_last(whole: Path) -> None:
    checkpoints = whole / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_2", "step_4", "step_6"]
    assert (checkpoints / "latest").read_text() == "step_6"
    newest = max(checkpoints.rglob("*"), key=lambda path: path.stat().st_mtime_ns if path.is_file() else 0)
    assert newest.name == "latest"
    files = sorted((path for path in (checkpoints / "step_6").rglob("*") if path.is_file()), key=os.path.getmtime)
    assert files[-1].name == "complete.json"


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda folder: (folder / "complete.json").unlink(), "complete.json is missing"),
        (lambda folder: (folder / "complete.json").write_text('{"step": 2'), "complete.json is damaged"),
        (lambda folder: (folder / "complete.json").write_text("[]"), "complete.json is damaged"),
        (lambda folder: (folder / "complete.json").write_text('{"step": 2}'), "complete.json is damaged"),
        (lambda folder: (folder / "hf" / "config.json").unlink(), "hf/config.json is missing"),
        (lambda folder: (folder / "policy" / "latest").write_text(""), "policy/latest has 0 bytes instead of 5"),
    ],
)
def test_what_is_incomplete_is_named(whole: Path, tmp_path: Path, damage, line: str) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "step_2"
    shutil.copytree(whole / "checkpoints" / "step_2", folder)
    assert incomplete(folder) is None
    damage(folder)
    assert (incomplete(folder) or "").startswith(line)


RELOAD = """
import sys
import numpy as np, torch
from rl.models.diffusion_lm import DiffusionLM

model = DiffusionLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    np.save(sys.argv[2], model(torch.arange(12)[None] % 6).numpy())
"""


def test_export_reloads_in_a_clean_process_with_equal_logits(whole: Path, tmp_path: Path) -> None:
    """The exported folder against the weights in DeepSpeed's own file of the newest checkpoint."""
    done = runs.cli("export", whole, tmp_path / "model")
    assert done.returncode == 0, done.stderr
    done = runs.execute([sys.executable, "-c", RELOAD, tmp_path / "model", tmp_path / "logits.npy"])
    assert done.returncode == 0, done.stderr
    state = whole / "checkpoints" / "step_6" / "policy" / "state" / "mp_rank_00_model_states.pt"
    trained = torch.load(state, weights_only=False)["module"]
    model = DiffusionLM(DiffusionLMConfig.from_pretrained(whole / "warm_start")).eval()
    model.load_state_dict({name.removeprefix("model."): value for name, value in trained.items()})
    with torch.no_grad():
        expected = model(torch.arange(12)[None] % 6).numpy()
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), expected)
    done = runs.cli("export", whole, tmp_path / "model")
    assert done.returncode == 2 and "exists: name a new folder" in done.stderr


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_whole(tmp_path: Path) -> None:
    """First the weights do not fit (safetensors), then the optimizer (torch under DeepSpeed)."""
    arguments = runs.tiny_config(tmp_path, "checkpoint.every=1", "run.resume=true")
    runs.train_here([*arguments, "train.steps=1"])
    run = tmp_path / "run"
    size = (run / "checkpoints" / "step_1" / "hf" / "model.safetensors").stat().st_size
    for limit, name in ((size - 1, "hf"), (size + 1, "policy")):
        with runs.files_of_at_most(limit), pytest.raises(OSError, match=r"disk full|too large") as error:
            runs.train_here([*arguments, "train.steps=2"])
        assert str(error.value).endswith(f"'{run / 'checkpoints' / 'step_2' / name}'")
        assert find_checkpoint(run)[0] == run / "checkpoints" / "step_1"
    runs.train_here([*arguments, "train.steps=2"])
    assert [line["step"] for line in runs.lines(run, "train")] == [1, 2]
