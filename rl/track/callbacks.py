"""What happens in a run is told to callbacks: `transformers.TrainerCallback`s of the user, and the trackers.

There is one path: the loop and `MetricsWriter.log` tell `Callbacks`, which tells the trackers (`rl.track.services`)
and then the user's callbacks. No torch at import.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rl.track.services import Service


class Wishes(NamedTuple):
    """What callbacks ask of the loop."""

    stop: bool = False
    save: bool = False
    evaluate: bool = False
    failed: bool = False

    @staticmethod
    def of_all(ranks: Iterable[Wishes]) -> Wishes:
        """What the callbacks of any rank ask for."""
        return Wishes(*(any(wishes) for wishes in zip(*ranks, strict=True)))


class Callbacks:
    """The callbacks of a run on this rank.

    Events and arguments are those of transformers' Trainer: on_train_begin, on_step_begin, on_step_end, on_log,
    on_evaluate, on_save and on_train_end, with `args`, `state`, `control`, and as keywords `model`, `processing_class`,
    `optimizer` and `lr_scheduler`. A step is an RL step. `on_views` is ours: rollouts of held-out prompts.

    Attributes:
        state: `transformers.TrainerState`; None without callbacks of the user.
        control: `transformers.TrainerControl`: should_training_stop, should_save and should_evaluate are heeded.
        error: what a callback of the user raised. The loop writes a checkpoint and raises it; nothing is told after it.
    """

    def __init__(self, users: Sequence[Any] = (), services: Sequence[Service] = (), args: Any = None):
        """
        Args:
            users: instances of `TrainerCallback`; every rank has them.
            services: trackers; rank 0 alone has them.
            args: what callbacks get as `args`.
        """
        self.users, self.services, self.args = list(users), list(services), args
        self.state: Any = None
        self.control: Any = None
        self.error: Exception | None = None
        self.objects: dict[str, Any] = {}
        if users:
            # Two seconds that only they need.
            from transformers.trainer_callback import TrainerControl, TrainerState

            self.state, self.control = TrainerState(), TrainerControl()

    def begin(self, step: int, num_steps: int, is_rank_0: bool, **objects: Any) -> None:
        """The RL stage begins, or goes on, after `step` steps; `objects` are the keywords of all later events."""
        self.objects |= objects
        if self.state is not None:
            self.state.is_world_process_zero = self.state.is_local_process_zero = is_rank_0
            self.state.max_steps = num_steps
            self._at(step)
        self.tell("on_train_begin")

    def step_begins(self) -> None:
        """The next RL step begins; what was asked for at the last one is done."""
        if self.control is not None:
            self.control.should_save = self.control.should_evaluate = False
        self.tell("on_step_begin")

    def step_ends(self, step: int) -> None:
        """So many RL steps are done."""
        self._at(step)
        self.tell("on_step_end")

    def _at(self, step: int) -> None:
        if self.state is not None:
            self.state.global_step = step
            self.state.epoch = step / max(self.state.max_steps, 1)

    def tell(self, event: str, **more: Any) -> None:
        """Call a method of every callback that has it."""
        for service in self.services:
            getattr(service, event, _nothing)(**more)
        for callback in self.users:
            if self.error is not None:
                return
            try:
                answer = getattr(callback, event, _nothing)(self.args, self.state, self.control, **self.objects, **more)
                if not isinstance(answer, type(self.control) | None):
                    name = f"{type(callback).__name__}.{event}"
                    raise TypeError(f"{name} returned {answer!r}: return control, or nothing")
            except Exception as error:
                self.error = error
            else:
                self.control = self.control if answer is None else answer

    def evaluated(self, metrics: Mapping[str, float], on_the_way: bool) -> None:
        """Tell `on_evaluate`, then note in the state the best evaluation on the way, by `args.metric_for_best_model`.

        transformers' Trainer does so, and its EarlyStoppingCallback needs it.
        """
        self.tell("on_evaluate", metrics=metrics)
        name = getattr(self.args, "metric_for_best_model", None)
        if self.state is None or not on_the_way or name is None:
            return
        value, best = metrics.get(f"eval_{name.removeprefix('eval_')}"), self.state.best_metric
        if value is not None and (best is None or (value > best if self.args.greater_is_better else value < best)):
            self.state.best_metric, self.state.best_global_step = value, self.state.global_step

    def log(self, step: int, stage: str, metrics: Mapping[str, float]) -> None:
        """Tell `on_log`; see `named`."""
        logs = self.named(stage, metrics)
        if self.state is not None:
            self.state.log_history.append({**logs, "step": step})
        self.tell("on_log", logs=logs, step=step, stage=stage)

    @staticmethod
    def named(stage: str, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics under transformers' names: `eval_accuracy@4` of `eval/accuracy@4`, those of the RL stage as they are,
        `sft/...` of the supervised stage.
        """
        prefix = {"train": "", "eval": "eval_"}.get(stage, f"{stage}/")
        return {prefix + name.removeprefix(f"{stage}/"): value for name, value in metrics.items()}

    def wishes(self) -> Wishes:
        """What this rank's callbacks ask for in the step that is going on."""
        control = self.control
        if control is None:
            return Wishes()
        failed = self.error is not None
        return Wishes(control.should_training_stop, control.should_save, control.should_evaluate, failed)


def _nothing(*_: Any, **__: Any) -> None:
    """An event that a callback has no method for."""
