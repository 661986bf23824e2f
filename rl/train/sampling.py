"""The rollouts of an RL step, and what is logged about them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from rl.advantages import zero_variance_groups
from rl.evaluate.backslide import backslide_of
from rl.train import distributed
from rl.train.session import ScoredRollouts, Session, join_metrics, padded


def sample_step(
    session: Session,
    step: int,
    policy_version: int,
    step_rewards: bool = False,
    splits: Sequence[tuple[int, int]] = (),
) -> ScoredRollouts:
    """The scored rollouts of this rank; batches of prompts are added while the filters leave too few of them.

    Args:
        step_rewards: score every step's full fill too.
        splits: where rollouts branch, for engines that can.
    """
    config = session.config
    wanted, rounds = config.train.prompts_per_step, config.filters.refill_rounds
    rows = session.task.train_rows(config.run.seed, step, wanted * (1 + rounds))
    parts: list[ScoredRollouts] = []
    kept = 0.0
    for start in range(0, len(rows), wanted):
        first, mine = session.shard(rows[start : start + wanted])
        first += start
        engine = session.rollout_engine(policy_version)
        if splits:
            engine.splits = tuple(splits)
        part = session.rollout(
            engine,
            mine,
            config.train.group_size,
            seed=step_seed(config.run.seed, step),
            first=first,
            steps=_step_counts(session, step, first, len(mine)),
            policy_version=policy_version,
            step_rewards=step_rewards,
        )
        parts.append(part)
        kept += distributed.reduce_number(len(part.group[part.keep].unique()), "sum", session.device)
        if kept >= wanted:
            break
    return ScoredRollouts.join(parts)


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
            "completion": session.medium.sample_line(rollouts.completions[i]),
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
