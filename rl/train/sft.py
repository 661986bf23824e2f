"""Supervised warm start: fit noised answers (the modality says how; text: `rl/estimators/masking.py`).

The conversion of an autoregressive model is a stage of the same form (`rl/train/convert.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from rl import distributed
from rl.errors import in_words
from rl.estimators.base import Rows
from rl.estimators.trace_rows import trace_rows, trained_steps
from rl.losses.aggregate import weighted_sum
from rl.run_folder import find_checkpoint
from rl.track.stopwatch import Stopwatch
from rl.train.checkpoint import load_checkpoint, save_checkpoint
from rl.train.learner import Learner
from rl.train.run import Run
from rl.values.model import Policy
from rollouts.trajectory import TokenTrajectory, load_trajectories

T = TypeVar("T")


class Part(NamedTuple):
    """A micro-batch: `part` of the batch of an update, and whether it only fills up a rank."""

    batch: list[Any]
    part: slice
    step: int
    spare: bool = False


class Fit:
    """The micro-batches of a stage and their loss. This one: answers under random masks, or recorded trajectories.

    Attributes:
        name: of the stage, its section in the config, and its folder.
        total: this rank's loss of the update so far.
    """

    name = "sft"
    learner: Learner

    def __init__(self, run: Run):
        self.run, self.config = run, getattr(run.config, self.name)
        self.seed, self.traces = run.config.run.seed, list[TokenTrajectory]()
        self.total: Any = 0.0

    def batch(self, step: int) -> list[Any]:
        """What the update fits, on all ranks."""
        if self.traces:
            return epochs(self.traces, self.seed, step, self.config.batch_size)
        return self.run.task.train_examples(self.seed, step, self.config.batch_size)

    def fitted(self, micro: Part) -> tuple[Rows, torch.Tensor]:
        """Rows, and the weight [U] of each decision's -logprob, or of its kl where the rows have one."""
        if self.traces:
            # The mean over the decisions of the batch: tokens that were revealed, and what was chosen.
            with in_words({"algorithm.shrink": "sft.merge_steps"}):
                rows = trace_rows(micro.batch[micro.part], self.run.model, shrink=self.config.merge_steps)
            decisions = sum(len(trained_steps(trajectory)) for trajectory in micro.batch)
            return rows, torch.full((len(rows.step),), 1.0 / decisions, dtype=torch.float64)
        # Every rank draws the masks of the whole batch and takes its part: they do not depend on the cut.
        return self.run.modality.supervised(self.run.model, micro.batch, micro.part, [self.seed, micro.step])

    def seen(self) -> tuple[float, str, dict[str, float]]:
        """What the update has fitted on all ranks: how many, their unit, and metrics of the stage's own."""
        unit = self.run.modality.unit
        return self.config.batch_size * (self.run.modality.horizon if unit == "tokens" else 1), unit, {}

    def parts(self, step: int) -> tuple[list[Part], Part]:
        """The micro-batches of this rank, and one that fills up the counts of ranks with fewer."""
        self.total, batch = 0.0, self.batch(step)
        first, mine = distributed.shard(batch)
        end = first + len(mine)
        size = self.config.micro_batch_size or max(len(mine), 1)
        parts = [Part(batch, slice(i, min(i + size, end)), step) for i in range(first, end, size)]
        return parts, Part(batch, slice(0, 1), step, spare=True)

    def loss(self, micro: Part) -> torch.Tensor:
        """A micro-batch's share of the loss of the update."""
        rows, weight = self.fitted(micro)
        scores = self.learner.forward(rows.to(self.run.device))
        value = weighted_sum(-scores.logprob if scores.kl is None else scores.kl, weight.to(self.run.device))
        if not micro.spare:
            self.total = self.total + value.detach()
        return value


def fit(run: Run, data: Fit, command: str, told_to_stop: Callable[[], int]) -> dict[str, float]:
    """Run a stage on `run.model` and return its summary (steps, seconds, final loss).

    A run that resumes goes on from the stage's newest complete checkpoint, in the folder `data.name` of the run.

    Args:
        command: sub-command that resumes it.

    Raises:
        Stopped: a rank was told to stop; its update is finished and in a checkpoint.
    """
    name, config = data.name, data.config
    learner = data.learner = Learner(
        Policy(run.model), run.config.train.deepspeed, config.optimizer, config.steps, run.device
    )
    plain, folder = Policy(run.model), run.folder / name
    run.progress.stage(name, config.steps)
    step, loss = 0, float("nan")
    if run.config.run.resume:
        checkpoint, notes = find_checkpoint(folder)
        if checkpoint is not None:
            step, state = load_checkpoint(checkpoint, {"policy": learner})
            loss = state["loss"]
            notes.append(f"resumed from {checkpoint}")
        run.metrics.truncate_after(step if checkpoint else -1, name)
        for note in notes:
            run.progress.message(note)
    watch, fitted = Stopwatch(), 0.0
    while step < config.steps:
        batches, spare = data.parts(step)
        before = learner.overflows
        norm = learner.update(batches, data.loss, spare)
        step += 1
        loss = distributed.reduce_number(float(data.total), "sum", run.device)
        seconds = watch.seconds
        count, unit, own = data.seen()
        fitted += count
        speed = fitted / seconds
        metrics = {"loss/total": loss, "policy/grad_norm": norm, "optimizer/lr": learner.learning_rate(), **own}
        if learner.scales_loss:
            metrics["optimizer/overflows"] = learner.overflows - before
        run.metrics.log(step, name, metrics | {f"speed/{unit}_per_s": speed})
        run.progress.update(step, loss=loss, **{f"{unit}_per_s": speed})
        out_of_time = bool(config.max_seconds and seconds > config.max_seconds)
        # On all ranks or on none: one that went on alone would wait for the others forever.
        ending = distributed.reduce_number(max(told_to_stop(), out_of_time), "max", run.device)
        failed = run.wishes().failed
        due = config.checkpoint_every and (step % config.checkpoint_every == 0 or step == config.steps)
        if ending > 1 or failed or due:
            learner.copy_weights_into(plain)
            keep = run.config.checkpoint.keep
            save_checkpoint(folder, step, {"policy": learner}, run.save_model, {"loss": loss}, keep)
        if failed:
            run.heard()
        if ending > 1:
            raise run.stopped(ending, step, command)
        if ending:
            break
    learner.copy_weights_into(plain)
    return {f"{name}_steps": step, **watch.read(name, run.device), f"{name}_loss": loss}


def supervised(run: Run, command: str = "train", told_to_stop: Callable[[], int] = lambda: 0) -> dict[str, float]:
    """The `sft` stage, see `fit`."""
    data, path = Fit(run), run.config.sft.trajectories
    data.traces = load_trajectories(path) if path else []
    values = max((int(t.choices[:, 2].max()) + 1 for t in data.traces if t.choices is not None), default=0)
    head = getattr(run.model, "choice_head", None)
    if values and (head is None or head.out_features < values):
        raise ValueError(
            f"sft.trajectories {path} chose between at least {values} values (sampler.choose), and the model has no "
            "head for so many: set model.choices to how many there were"
        )
    if not run.config.sft.joint:
        return fit(run, data, command, told_to_stop)
    model: Any = run.model
    if getattr(model, "joint_head", None) is None or model.attention != "full":
        raise ValueError("sft.joint trains the joint head of a full-attention model: set model.joint_head to true")
    others = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    model.joint_head.requires_grad_(True)
    summary = fit(run, data, command, told_to_stop)
    model.joint_head.requires_grad_(False)
    for parameter in others:
        parameter.requires_grad_(True)
    return summary


def epochs(items: Sequence[T], seed: int, step: int, size: int) -> list[T]:
    """The items of an update: whole epochs in an order that depends on (seed, epoch) only."""
    batch = []
    for index in range(step * size, (step + 1) * size):
        epoch, place = divmod(index, len(items))
        batch.append(items[np.random.default_rng([seed, epoch]).permutation(len(items))[place]])
    return batch
