"""Supervised warm start: fit noised answers (the modality says how; text: `rl/estimators/masking.py`)."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from rl.estimators.trace_rows import trace_rows
from rl.losses.aggregate import weighted_sum
from rl.tasks.base import Row
from rl.train import distributed
from rl.train.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from rl.train.learner import Learner
from rl.train.policy import Policy
from rl.train.run import Run
from rollouts.trajectory import TokenTrajectory, load_trajectories


def supervised(run: Run) -> dict[str, float]:
    """Run the `sft` stage on `run.model` and return its summary (steps, seconds, final loss).

    A run that resumes goes on from the stage's newest complete checkpoint, in the folder `sft` of the run.
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
    traces = load_trajectories(config.trajectories) if config.trajectories else []
    while step < config.steps:
        sums: list[torch.Tensor] = []
        losses = _trace_losses(run, learner, traces, step, sums) if traces else _losses(run, learner, step, sums)
        padding = losses.pop()
        norm = learner.update(losses, padding)
        step += 1
        loss = distributed.reduce_number(float(sum(sums)), "sum", run.device)
        seconds = time.perf_counter() - started
        speed = (step - first) * config.batch_size * run.modality.horizon / seconds
        run.metrics.log(
            step,
            "sft",
            {
                "loss/total": loss,
                "policy/grad_norm": norm,
                "optimizer/lr": learner.learning_rate(),
                "speed/tokens_per_s": speed,
            },
        )
        run.progress.update(step, loss=loss, tokens_per_s=speed)
        if config.checkpoint_every and step % config.checkpoint_every == 0:
            learner.copy_weights_into(plain)
            state = {"loss": loss, "world_size": distributed.world_size()}
            save_checkpoint(folder, step, {"policy": learner}, run.save_model, state, run.config.checkpoint.keep)
        out_of_time = bool(config.max_seconds and seconds > config.max_seconds)
        if distributed.reduce_number(out_of_time, "max", run.device):
            # On all ranks or on none: one that went on alone would wait for the others forever.
            break
    learner.copy_weights_into(plain)
    return {"sft_steps": step, "sft_seconds": time.perf_counter() - started, "sft_loss": loss}


def _losses(run: Run, learner: Learner, step: int, sums: list[torch.Tensor]) -> list[Callable[[], torch.Tensor]]:
    """The micro-batches of this rank under random masks, and one more to fill up other ranks' counts with."""
    config, seed = run.config.sft, run.config.run.seed
    rows = run.task.train_rows(seed, step, config.batch_size)
    first, mine = distributed.shard(rows)
    end = first + len(mine)
    size = config.micro_batch_size or max(len(mine), 1)
    parts = [slice(i, min(i + size, end)) for i in range(first, end, size)]
    # Every rank draws the masks of the whole batch and takes its part: they do not depend on the cut.
    losses = [_micro_batch(run, learner, rows, part, [seed, step], sums) for part in parts]
    return [*losses, _micro_batch(run, learner, rows, slice(0, 1), [seed, step], [])]


def _trace_losses(
    run: Run, learner: Learner, traces: list[TokenTrajectory], step: int, sums: list[torch.Tensor]
) -> list[Callable[[], torch.Tensor]]:
    """As `_losses`, on recorded trajectories."""
    config = run.config.sft
    batch = _trace_batch(traces, run.config.run.seed, step, config.batch_size)
    decisions = sum(int(t.is_reveal.sum()) for t in batch)
    _, mine = distributed.shard(batch)
    size = config.micro_batch_size or max(len(mine), 1)
    parts = [mine[i : i + size] for i in range(0, len(mine), size)]
    losses = [_trace_micro_batch(run, learner, part, decisions, sums) for part in parts]
    return [*losses, _trace_micro_batch(run, learner, batch[:1], decisions, [])]


def _micro_batch(
    run: Run, learner: Learner, rows: list[Row], part: slice, rng_seed: list[int], sums: list[torch.Tensor]
) -> Callable[[], torch.Tensor]:
    """A callable that returns this micro-batch's share of the loss of the whole batch `rows`."""

    def loss() -> torch.Tensor:
        fitted, weight = run.modality.supervised(run.model, rows, part, rng_seed)
        logprob = learner.engine(fitted.to(run.device)).logprob
        value = weighted_sum(-logprob, weight.to(run.device))
        sums.append(value.detach())
        return value

    return loss


def _trace_micro_batch(
    run: Run, learner: Learner, trajectories: list[TokenTrajectory], decisions: int, sums: list[torch.Tensor]
) -> Callable[[], torch.Tensor]:
    """A callable that returns this micro-batch's share of the mean loss per revealed token."""

    def loss() -> torch.Tensor:
        rows = trace_rows(trajectories, run.model).to(run.device)
        logprob = learner.engine(rows).logprob
        value = weighted_sum(-logprob, torch.full_like(logprob, 1.0 / decisions))
        sums.append(value.detach())
        return value

    return loss


def _trace_batch(trajectories: list[TokenTrajectory], seed: int, step: int, size: int) -> list[TokenTrajectory]:
    """Trajectories of an update: whole epochs in an order that depends on (seed, epoch) only."""
    batch = []
    for index in range(step * size, (step + 1) * size):
        epoch, place = divmod(index, len(trajectories))
        order = np.random.default_rng([seed, epoch]).permutation(len(trajectories))
        batch.append(trajectories[order[place]])
    return batch
