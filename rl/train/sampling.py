"""The rollouts of an RL step, and what is logged about them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rl.advantages import zero_variance_groups
from rl.evaluation.backslide import backslide_of
from rl.tasks.base import Row
from rl.train import distributed
from rl.train.session import ScoredRollouts, Session, join_metrics, padded
from rollouts.engines.base import check_versions


def sample_step(
    session: Session,
    step: int,
    policy_version: int,
    step_rewards: bool = False,
    splits: Callable[[int], Sequence[tuple[int, int]]] | None = None,
) -> ScoredRollouts:
    """The scored rollouts of this rank; batches of prompts are added while the filters leave too few of them.

    With `rollout.asynchronous` they were sampled while the last step learned, by older weights than `policy_version`;
    those of the next step are begun before this returns.

    Args:
        step_rewards: score every step's full fill too.
        splits: index of an RL step -> where its rollouts branch, for engines that can.
    """
    config = session.config
    wanted, rounds = config.train.prompts_per_step, config.filters.refill_rounds
    parts: list[ScoredRollouts] = []
    kept = 0.0
    for turn in range(1 + rounds):
        rows, requests = _asked(session, step, turn)
        if session.ahead is None:
            engine = session.rollout_engine(policy_version, splits(step) if splits else ())
            trajectories = engine.generate(requests, policy_version)
            check_versions(trajectories, policy_version)
            stats = engine.stats
        else:
            if not session.ahead.begun():
                engine = session.rollout_engine(policy_version, splits(step) if splits else ())
                session.ahead.begin(engine, requests, policy_version)
            trajectories, stats = session.ahead.take()
            if step + 1 < config.train.steps:
                engine = session.rollout_engine(policy_version, splits(step + 1) if splits else ())
                session.ahead.begin(engine, _asked(session, step + 1)[1], policy_version)
        part = session.scored(rows, config.train.group_size, trajectories, stats, step_rewards=step_rewards)
        parts.append(part)
        kept += distributed.reduce_number(len(part.group[part.keep].unique()), "sum", session.device)
        if kept >= wanted:
            break
    return ScoredRollouts.join(parts)


def _asked(session: Session, step: int, turn: int = 0) -> tuple[list[Row], list[Any]]:
    """This rank's rows of an RL step and the requests for them; refills are turns 1, 2, ..."""
    train, seed = session.config.train, session.config.run.seed
    start = turn * train.prompts_per_step
    rows = session.task.train_rows(seed, step, train.prompts_per_step * (1 + session.config.filters.refill_rounds))
    first, mine = distributed.shard(rows[start : start + train.prompts_per_step])
    first += start
    counts = _step_counts(session, step, first, len(mine))
    return mine, session.requests(mine, train.group_size, step_seed(seed, step), first, counts)


def step_seed(seed: int, step: int) -> int:
    """Base of the request seeds of an RL step."""
    return seed * 1_000_003 + step + 1


def _step_counts(session: Session, step: int, first: int, count: int) -> list[int] | None:
    """num_inference_steps of every prompt, drawn from `train.mixed_steps` by (seed, step, prompt)."""
    choices = session.config.train.mixed_steps
    if not choices:
        return None
    seed = session.config.run.seed
    return [random.Random(f"steps {seed} {step} {first + i}").choice(choices) for i in range(count)]


def sample_lines(session: Session, rollouts: ScoredRollouts, count: int = 2) -> list[dict[str, Any]]:
    """The first rollouts as plain JSON."""
    return [
        {
            "prompt": rollouts.rows[i]["prompt"],
            "completion": session.modality.sample_line(rollouts.completions[i]),
            "reward": rollouts.table.values[i],
            "num_steps": rollouts.trajectories[i].num_steps,
        }
        for i in range(min(count, len(rollouts.completions)))
    ]


def rollout_metrics(rollouts: ScoredRollouts, device: torch.device) -> dict[str, float]:
    """Over all ranks: reward mean with a 95 % interval over prompts, failures, zero-variance groups, the rewards' and
    the filters' own numbers, tokens generated, and the share of forwarded rows that were distinct.
    """
    reward: list[float] = []
    group: list[int] = []
    for values, groups in distributed.gather_objects((rollouts.reward.tolist(), rollouts.group.tolist())):
        offset = max(group, default=-1) + 1
        reward += values
        group += [g + offset for g in groups]
    rewards, groups = torch.tensor(reward, dtype=torch.float64), torch.tensor(group)
    filtered = distributed.sum_metrics(rollouts.filtered, device)
    work = distributed.sum_metrics(vars(rollouts.stats), device)
    slid, steps = {}, None
    if rollouts.step_reward is not None:
        everywhere = [s for part in distributed.gather_objects(rollouts.step_reward) for s in part]
        steps = padded(everywhere)
        slid = {f"rollout/backslide_{name}": value for name, value in vars(backslide_of(everywhere)).items()}
    return {
        **slid,
        **join_metrics(distributed.gather_objects((rollouts.table.metrics, len(rollouts.completions)))),
        **filtered,
        "rollout/tokens": work["generated_tokens"],
        "rollout/retries": work["retries"],
        "rollout/repushes": work["repushes"],
        "rollout/workers_lost": work["workers_lost"],
        "rollout/requests_reassigned": work["requests_reassigned"],
        "speed/distinct_row_share": work["sequence_forwards"] / max(work["rows_asked"], 1),
        **prompt_interval(rewards, groups),
        "reward/failed": filtered["filters/unscored"],
        "reward/zero_variance_share": float(zero_variance_groups(rewards, groups, steps).double().mean()),
    }


def prompt_interval(reward: torch.Tensor, prompt: torch.Tensor) -> dict[str, float]:
    """`reward/mean` with a 95 % interval over prompts, since rollouts of one prompt are not independent.

    Args:
        reward: float64 [M], NaN where there is none.
        prompt: int64 [M], 0, 1, ...; one alone has no interval.
    """
    scored = [reward[(prompt == p) & ~torch.isnan(reward)] for p in prompt.unique()]
    means = torch.stack([s.mean() for s in scored if len(s)] or [torch.tensor(torch.nan, dtype=torch.float64)])
    mean = float(means.mean())
    half = 1.96 * float(means.std(correction=1)) / len(means) ** 0.5 if len(means) > 1 else float("nan")
    return {"reward/mean": mean, "reward/low": mean - half, "reward/high": mean + half}
