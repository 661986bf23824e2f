"""Supervised warm start: fit noised answers (the modality says how; text: `rl/estimators/masking.py`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from rl import distributed
from rl.estimators.base import Rows
from rl.estimators.trace_rows import trace_rows
from rl.losses.aggregate import weighted_sum
from rl.run_folder import find_checkpoint
from rl.train.checkpoint import load_checkpoint, save_checkpoint
from rl.train.learner import Learner
from rl.train.run import Run
from rl.values.model import Policy
from rollouts.trajectory import TokenTrajectory, load_trajectories


def supervised(run: Run, command: str = "train", told_to_stop: Callable[[], int] = lambda: 0) -> dict[str, float]:
    """Run the `sft` stage on `run.model` and return its summary (steps, seconds, final loss).

    A run that resumes goes on from the stage's newest complete checkpoint, in the folder `sft` of the run.

    Args:
        command: sub-command that resumes it.

    Raises:
        Stopped: a rank was told to stop; its update is finished and in a checkpoint.
    """
    config = run.config.sft
    learner = Learner(Policy(run.model), run.config.train.deepspeed, config.optimizer, config.steps, run.device)
    plain, folder = Policy(run.model), run.folder / "sft"
    run.progress.stage("sft", config.steps)
    step, loss = 0, float("nan")
    if run.config.run.resume:
        checkpoint, notes = find_checkpoint(folder)
        if checkpoint is not None:
            step, state = load_checkpoint(checkpoint, {"policy": learner})
            loss = state["loss"]
            notes.append(f"resumed from {checkpoint}")
        run.metrics.truncate_after(step if checkpoint else -1, "sft")
        for note in notes:
            run.progress.message(note)
    started, first = time.perf_counter(), step
    fit = _Fit(run, learner)
    while step < config.steps:
        batches, spare = fit.batches(step)
        before = learner.overflows
        norm = learner.update(batches, fit.loss, spare)
        step += 1
        loss = distributed.reduce_number(float(fit.total), "sum", run.device)
        seconds = time.perf_counter() - started
        unit = run.modality.unit
        speed = (step - first) * config.batch_size * (run.modality.horizon if unit == "tokens" else 1) / seconds
        metrics = {"loss/total": loss, "policy/grad_norm": norm, "optimizer/lr": learner.learning_rate()}
        if learner.scales_loss:
            metrics["optimizer/overflows"] = learner.overflows - before
        run.metrics.log(step, "sft", metrics | {f"speed/{unit}_per_s": speed})
        run.progress.update(step, loss=loss, **{f"{unit}_per_s": speed})
        out_of_time = bool(config.max_seconds and seconds > config.max_seconds)
        # On all ranks or on none: one that went on alone would wait for the others forever.
        ending = distributed.reduce_number(max(told_to_stop(), out_of_time), "max", run.device)
        if ending > 1 or (config.checkpoint_every and step % config.checkpoint_every == 0):
            learner.copy_weights_into(plain)
            keep = run.config.checkpoint.keep
            save_checkpoint(folder, step, {"policy": learner}, run.save_model, {"loss": loss}, keep)
        if ending > 1:
            raise run.stopped(ending, step, command)
        if ending:
            break
    learner.copy_weights_into(plain)
    return {"sft_steps": step, "sft_seconds": time.perf_counter() - started, "sft_loss": loss}


class _Part(NamedTuple):
    """A micro-batch: `part` of the batch of an update, and whether it only fills up a rank."""

    batch: list[Any]
    part: slice
    step: int
    spare: bool = False


class _Fit:
    """The micro-batches of the stage and their loss: answers under random masks, or recorded trajectories.

    Attributes:
        total: this rank's loss of the update so far.
    """

    def __init__(self, run: Run, learner: Learner):
        self.run, self.learner = run, learner
        path = run.config.sft.trajectories
        self.traces = load_trajectories(path) if path else []
        self.total: Any = 0.0

    def batches(self, step: int) -> tuple[list[_Part], _Part]:
        """The micro-batches of this rank, and one that fills up the counts of ranks with fewer."""
        self.total = 0.0
        config, seed, batch = self.run.config.sft, self.run.config.run.seed, []
        if self.traces:
            batch += _trace_batch(self.traces, seed, step, config.batch_size)
        else:
            batch += self.run.task.train_examples(seed, step, config.batch_size)
        first, mine = distributed.shard(batch)
        end = first + len(mine)
        size = config.micro_batch_size or max(len(mine), 1)
        parts = [_Part(batch, slice(i, min(i + size, end)), step) for i in range(first, end, size)]
        return parts, _Part(batch, slice(0, 1), step, spare=True)

    def loss(self, micro: _Part) -> torch.Tensor:
        """A micro-batch's share of the loss of the update."""
        rows, weight = self._fitted(micro)
        logprob = self.learner.forward(rows.to(self.run.device)).logprob
        value = weighted_sum(-logprob, weight.to(self.run.device))
        if not micro.spare:
            self.total = self.total + value.detach()
        return value

    def _fitted(self, micro: _Part) -> tuple[Rows, torch.Tensor]:
        """Rows, and the weight [U] of each decision's -logprob."""
        if self.traces:
            # The mean over the revealed tokens of the batch.
            rows = trace_rows(micro.batch[micro.part], self.run.model)
            decisions = sum(int(trajectory.is_reveal.sum()) for trajectory in micro.batch)
            return rows, torch.full((len(rows.step),), 1.0 / decisions, dtype=torch.float64)
        # Every rank draws the masks of the whole batch and takes its part: they do not depend on the cut.
        seed = [self.run.config.run.seed, micro.step]
        return self.run.modality.supervised(self.run.model, micro.batch, micro.part, seed)


def _trace_batch(trajectories: list[TokenTrajectory], seed: int, step: int, size: int) -> list[TokenTrajectory]:
    """Trajectories of an update: whole epochs in an order that depends on (seed, epoch) only."""
    batch = []
    for index in range(step * size, (step + 1) * size):
        epoch, place = divmod(index, len(trajectories))
        order = np.random.default_rng([seed, epoch]).permutation(len(trajectories))
        batch.append(trajectories[order[place]])
    return batch
