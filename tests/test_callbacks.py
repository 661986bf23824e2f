"""Callbacks of a run: what they are told, what the loop does for them, and a callback that raises."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from rl.config import load_config
from rl.run_folder import checkpoint_steps
from rl.track.callbacks import Callbacks, Wishes
from rl.track.jsonl import MetricsWriter
from rl.track.services import Service, open_services, shown_samples
from rl.train.loop import train
from rl.train.run import Run
from tests import runs


class Recorder(TrainerCallback):
    """Notes every event with the step it came at; asks for checkpoints, an evaluation after the first step, and for the
    end when the second checkpoint is written."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.logs: list[dict[str, float]] = []

    def _note(self, event: str, state: Any) -> None:
        self.events.append((event, state.global_step))

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self._note("train_begin", state)
        assert (state.max_steps, state.is_world_process_zero) == (3, True)
        # The schedule is that of the optimizer.
        assert objects["lr_scheduler"].optimizer is objects["optimizer"] and objects["model"].mask_token_id is not None
        assert objects["processing_class"].mask_token == "<mask>"

    def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self._note("step_begin", state)

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> Any:
        self._note("step_end", state)
        control.should_evaluate = state.global_step == 1
        control.should_save = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **objects: Any) -> None:
        self.logs.append(logs)
        self._note("log eval" if any(name.startswith("eval_") for name in logs) else "log", state)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **objects: Any) -> None:
        self._note("evaluate", state)
        assert 0 <= metrics["eval_accuracy@4"] <= 1

    def on_save(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self._note("save", state)
        if state.global_step == 2:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self._note("train_end", state)


class Fails(TrainerCallback):
    def __init__(self, event: str, step: int) -> None:
        setattr(self, event, self.fail)
        self.step = step

    def fail(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step == self.step:
            raise ZeroDivisionError("of the user's own")


def begin(folder: Path, *callbacks: Any, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    arguments = runs.tiny_config(folder, "train.epochs=1", "sft.steps=1", *overrides)
    with Run.open(load_config(arguments[1], arguments[2:]), callbacks=callbacks) as run:
        return train(run)


def test_events_come_in_transformers_order_and_wishes_are_granted(tmp_path: Path) -> None:
    recorder = Recorder()
    summary = begin(tmp_path, recorder)
    steps = [("step_begin", 0), ("step_end", 1), ("log", 1), ("log eval", 1), ("evaluate", 1), ("save", 1)]
    steps += [("step_begin", 1), ("step_end", 2), ("log", 2), ("save", 2), ("train_end", 2)]
    before = [("log", 0), ("log eval", 0), ("evaluate", 0), ("train_begin", 0)]
    assert recorder.events == [*before, *steps, ("log eval", 2), ("evaluate", 2)]
    assert summary["train_steps"] == 2 and checkpoint_steps(tmp_path / "run" / "checkpoints") == [1, 2]
    # The numbers are those of metrics.jsonl, under transformers' names.
    record = runs.lines(tmp_path / "run", "train")[0]
    assert recorder.logs[2]["reward/mean"] == record["reward/mean"]
    assert "sft/loss/total" in recorder.logs[0] and "eval_accuracy@4" in recorder.logs[1]


@pytest.mark.parametrize(("event", "step", "kept"), [("on_step_end", 2, 2), ("on_step_begin", 1, 1), ("on_log", 0, 0)])
def test_a_callback_that_raises_ends_the_run_with_its_traceback_and_a_checkpoint(
    tmp_path: Path, event: str, step: int, kept: int
) -> None:
    with pytest.raises(ZeroDivisionError, match="of the user's own") as caught:
        begin(tmp_path, Fails(event, step), overrides=("sft.steps=0",))
    assert caught.traceback[-1].name == "fail"
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [kept]
    # The run goes on where it ended.
    if step == 2:
        begin(tmp_path, overrides=("sft.steps=0", "run.resume=true"))
        assert [line["step"] for line in runs.lines(tmp_path / "run", "train")] == [1, 2, 3]


def test_a_callback_is_told_nothing_after_it_raised_and_all_ranks_hear_of_it() -> None:
    told: list[str] = []

    class First(TrainerCallback):
        def on_save(self, *_: Any, **__: Any) -> None:
            raise KeyError("first")

    class Second(TrainerCallback):
        def on_save(self, *_: Any, **__: Any) -> None:
            told.append("saved")

    callbacks = Callbacks([Second(), First(), Second()])
    callbacks.tell("on_save")
    callbacks.tell("on_save")
    assert told == ["saved"] and isinstance(callbacks.error, KeyError)
    assert Wishes.of_all([Wishes(), Wishes(save=True), callbacks.wishes()]) == Wishes(False, True, False, True)


def test_early_stopping_of_transformers_counts_evaluations_on_the_way() -> None:
    """Best 0.5; 0.4 and 0.5 are no gain, so patience 2 is over. The one before training is of other problems."""
    args = SimpleNamespace(metric_for_best_model="reward@4", greater_is_better=True, load_best_model_at_end=True)
    callbacks = Callbacks([EarlyStoppingCallback(2)], args=args)
    args.eval_strategy = IntervalStrategy.STEPS
    callbacks.evaluated({"eval_reward@4": 0.9}, on_the_way=False)
    stops = []
    for step, value in enumerate((0.3, 0.5, 0.4, 0.5), start=1):
        callbacks.step_ends(step)
        callbacks.evaluated({"eval_reward@4": value}, on_the_way=True)
        stops.append(callbacks.wishes().stop)
    assert stops == [False, False, False, True] and callbacks.error is None
    assert (callbacks.state.best_metric, callbacks.state.best_global_step) == (0.5, 2)
    args.greater_is_better = False
    callbacks.evaluated({"eval_reward@4": 0.1}, on_the_way=True)
    assert callbacks.state.best_metric == 0.1


def test_a_callback_that_returns_something_else_is_named() -> None:
    class Wrong(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> Any:
            return True

    callbacks = Callbacks([Wrong()])
    callbacks.step_ends(1)
    assert str(callbacks.error) == "Wrong.on_step_end returned True: return control, or nothing"
    assert callbacks.wishes().failed


class Tracker:
    """A tracker that takes nothing back."""

    def __init__(self, is_new: bool) -> None:
        self.is_new, self.lines = is_new, []

    def log(self, step: int, stage: str, metrics: dict[str, float]) -> None:
        self.lines.append((stage, step, metrics))

    def close(self) -> None: ...


def test_after_a_resume_a_tracker_holds_every_step_once(tmp_path: Path) -> None:
    """It has steps 1 to 4 when the run goes on after step 2; one that is asked for only then gets the steps before."""
    first = Tracker(True)
    with MetricsWriter(tmp_path, callbacks=Callbacks(services=[Service("first", lambda: first)])) as metrics:
        metrics.log(7, "sft", {"loss": 1.5})
        for step in range(1, 5):
            metrics.log(step, "train", {"a": step})
        metrics.log(4, "eval", {"eval/accuracy@4": 0.5})
    old, new = Tracker(False), Tracker(True)
    services = [Service("old", lambda: old), Service("new", lambda: new)]
    with MetricsWriter(tmp_path, callbacks=Callbacks(services=services)) as metrics:
        metrics.truncate_after(2)
        metrics.truncate_after(7, "sft")
        for step in range(3, 7):
            metrics.log(step, "train", {"a": step})
    trained = [("train", step, {"train/a": step}) for step in range(1, 7)]
    whole = [("sft", 7, {"sft/loss": 1.5}), *trained[:4], ("eval", 4, {"eval/accuracy@4": 0.5}), *trained[4:]]
    assert [*first.lines, *old.lines] == whole
    assert new.lines == [whole[0], *trained]


def test_samples_become_images_and_a_table_of_canvases(tmp_path: Path) -> None:
    canvases = [{"tokens": ["", "", "", ""]}, {"tokens": ["", "2", "|", "a\nb"]}]
    text = [{"prompt": "p", "view": {"steps": canvases, "correct": True}}]
    assert shown_samples(text, (2, 2))[1] == [
        {"prompt": "p", "step": 0, "canvas": "__\n__", "correct": True},
        {"prompt": "p", "step": 1, "canvas": "_2\n|a\nb", "correct": True},
    ]
    import numpy as np

    from rewards.image import data_url

    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    picture = [{"prompt": "a cat", "view": {"image": data_url(pixels), "correct": False}}]
    ((caption, image),), table = shown_samples([*picture, {"prompt": "b", "view": {"image": ""}}], None)
    assert caption == "a cat" and not table and (np.asarray(image) == pixels).all()

    pytest.importorskip("tensorboard")
    (service,) = open_services(["tensorboard"], tmp_path)
    service.on_views(items=text, step=3, grid=None)
    service.on_views(items=picture, step=4, grid=None)
    service.close()
    assert not service.failures
    script = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
events = EventAccumulator(sys.argv[1]); events.Reload()
(table,) = events.Tensors("samples/denoising/text_summary")
print(json.dumps([table.step, table.tensor_proto.string_val[0].decode(), events.Tags()["images"]]))
"""
    done = runs.execute([sys.executable, "-c", script, tmp_path / "tensorboard" / "samples"])
    assert done.returncode == 0, done.stderr
    step, table, images = json.loads(done.stdout)
    assert (step, images) == (3, ["samples/0: a cat"])
    assert table.splitlines()[0] == "| prompt | step | canvas | correct |" and "_2\\|a<br>b" in table
