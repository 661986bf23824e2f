"""What every stage of a run shares: the objects a config describes, and rollouts that are scored."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rewards.run import RewardRunner
from rewards.table import RewardPart, ScoreTable
from rl.config import Config, save_config
from rl.errors import about
from rl.modalities.base import Modality, open_modality
from rl.tasks.base import Row
from rl.tasks.load import load_task
from rl.track.jsonl import MetricsWriter
from rl.track.progress import Progress
from rl.track.services import open_services
from rl.train import distributed
from rl.train.ahead import Ahead
from rl.train.engines import PolicyWeights, engine_needs, open_engine
from rl.train.filters import keep_mask
from rl.train.policy import share_frozen, trained_copy
from rollouts.engines.base import Engine, EngineStats, check_versions, require


@dataclass
class ScoredRollouts:
    """The rollouts of this rank and their verdicts; M = prompts x group_size, a prompt's rollouts together.

    Attributes:
        completions: [M], what the modality shows to rewards (text, images).
        reward: float64 [M], NaN where there is no score.
        group: int64 [M], index of the prompt on this rank.
        keep: bool [M], what the filters leave for the update.
        counted: bool [M], what the loss is averaged over (`rl.train.filters.keep_mask`).
        step_reward: [M] float64 [T_i], the reward of every step's full fill, where it was asked for.
    """

    rows: list[Row]
    trajectories: list[Any]
    completions: list[Any]
    table: ScoreTable
    reward: torch.Tensor
    group: torch.Tensor
    stats: EngineStats
    keep: torch.Tensor
    counted: torch.Tensor
    step_reward: list[np.ndarray] | None = None
    reward_seconds: float = 0.0
    filtered: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def of_one(trajectory: Any, like: ScoredRollouts) -> ScoredRollouts:
        """A single trajectory of reward 0."""
        nothing = torch.zeros(1, dtype=torch.float64)
        group, keep = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
        return ScoredRollouts([], [trajectory], [], like.table, nothing, group, like.stats, keep, keep)

    @staticmethod
    def join(parts: Sequence[ScoredRollouts]) -> ScoredRollouts:
        """Several batches of prompts as one."""
        if len(parts) == 1:
            return parts[0]
        groups, offset = [], 0
        for part in parts:
            groups.append(part.group + offset)
            offset += int(part.group.max()) + 1 if len(part.group) else 0
        table = ScoreTable(
            values=[v for p in parts for v in p.table.values],
            parts={k: [s for p in parts for s in p.table.parts[k]] for k in parts[0].table.parts},
            metrics=join_metrics([(p.table.metrics, len(p.completions)) for p in parts]),
            steps=[s for p in parts for s in p.table.steps],
        )
        return ScoredRollouts(
            rows=[row for p in parts for row in p.rows],
            trajectories=[t for p in parts for t in p.trajectories],
            completions=[c for p in parts for c in p.completions],
            table=table,
            reward=torch.cat([p.reward for p in parts]),
            group=torch.cat(groups),
            stats=EngineStats(**_sum([vars(p.stats) for p in parts])),  # type: ignore[arg-type]
            keep=torch.cat([p.keep for p in parts]),
            counted=torch.cat([p.counted for p in parts]),
            step_reward=None if parts[0].step_reward is None else [s for p in parts for s in p.step_reward or []],
            reward_seconds=sum(p.reward_seconds for p in parts),
            filtered=_sum([p.filtered for p in parts]),
        )


def padded(rows: Sequence[np.ndarray]) -> torch.Tensor:
    """float64 [M, T] from M rows of unequal lengths, NaN behind the end of each."""
    width = max((len(row) for row in rows), default=0)
    table = torch.full((len(rows), width), torch.nan, dtype=torch.float64)
    for into, row in zip(table, rows, strict=True):
        into[: len(row)] = torch.from_numpy(row)
    return table


def _sum(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for record in records for name in record)
    return {name: sum(record.get(name, 0.0) for record in records) for name in names}


# Reward metrics that count something; every other one is a mean over completions.
_COUNTS = ("failures", "not_applicable", "timeouts", "retries", "cache_hits", "masked", "seconds")


def join_metrics(parts: Sequence[tuple[Mapping[str, float], int]]) -> dict[str, float]:
    """Reward metrics of several batches (or ranks): counts add up, means are weighted by completions."""
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    for metrics, size in parts:
        for name, value in metrics.items():
            counted = name.endswith(_COUNTS)
            sums[name] = sums.get(name, 0.0) + value * (1 if counted else size)
            weights[name] = 1 if counted else weights.get(name, 0) + size
    return {name: value / max(weights[name], 1) for name, value in sums.items()}


@dataclass
class Costs:
    """What a run has spent, over all ranks."""

    forward_passes: float = 0
    backward_passes: float = 0
    sequence_forwards: float = 0
    tokens_forwarded: float = 0
    reward_queries: float = 0
    updates: float = 0

    def as_metrics(self) -> dict[str, float]:
        return {f"cost/{name}": value for name, value in vars(self).items()}


@dataclass
class Session:
    """Model, tokenizer, task, rewards and logs of one run. Use as a context manager.

    Example: `with Session.open(config) as session: train(session)`.
    """

    config: Config
    device: torch.device
    task: Any
    modality: Any
    model: Any
    rewards: RewardRunner
    verifier: RewardRunner
    metrics: MetricsWriter
    progress: Progress
    costs: Costs = field(default_factory=Costs)
    # What samples the rollouts that are learned from, where that is not the model of this process.
    remote: Engine | None = None
    # The rollouts of the next step, when they are sampled beside the learner.
    ahead: Ahead | None = None
    # Seconds that pushing weights to `remote` took so far.
    push_seconds: float = 0.0
    _pushed: int | None = None

    @classmethod
    def open(cls, config: Config, write: bool = True) -> Session:
        """Build everything a config names.

        Args:
            write: False leaves the disk alone (evaluation of a model, dry runs).

        Raises:
            ValueError: anything the user got wrong, in one line.
        """
        with about(f"run.device {config.run.device!r}"):
            device = distributed.pick_device(config.run.device)
        if config.run.num_threads:
            torch.set_num_threads(config.run.num_threads)
        with about(f"task.name {config.task.name!r} with task.params {config.task.params}"):
            task = load_task(config.task.name, config.task.params)
        modality: Modality = open_modality(config, task)
        policy: Any = modality.load_model()
        parts = [RewardPart(p.name, p.weight, p.params, p.normalize) for p in config.reward.functions]
        own = [RewardPart(task.reward, params=config.reward.params_of(task.reward))]
        rewards, verifier = (
            RewardRunner(
                chosen,
                mode=config.reward.mode,
                num_workers=config.reward.num_workers,
                timeout_seconds=config.reward.timeout_seconds,
                max_failure_share=config.reward.max_failure_share,
                outage_seconds=config.reward.outage_seconds,
            ).__enter__()
            for chosen in (parts or own, own)
        )
        # Alone, only a learner needs a process group; it starts one of its own.
        if distributed.launched():
            distributed.start(device, config.run.collective_timeout_seconds)
        rank = distributed.rank() if write else 1
        services = (
            open_services(config.run.services, config.run.output_dir, config=config.model_dump(mode="json"))
            if rank == 0
            else []
        )
        if rank == 0:
            with about(f"run.output_dir {config.run.output_dir!r}"):
                Path(config.run.output_dir).mkdir(parents=True, exist_ok=True)
                save_config(config, Path(config.run.output_dir) / "config.yaml")
        metrics = MetricsWriter(config.run.output_dir, rank, services)
        policy.to(device)
        progress = Progress(enabled=distributed.rank() == 0)
        return cls(config, device, task, modality, policy, rewards, verifier, metrics, progress)

    def __enter__(self) -> Session:
        self.progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.remote is not None:
            self.remote.close()
            self.remote = None
        if self.ahead is not None:
            self.ahead.close()
            self.ahead = None
        self.progress.__exit__(*error)
        self.metrics.close()
        self.rewards.close()
        self.verifier.close()

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run.output_dir)

    @property
    def tokenizer(self) -> Any:
        return self.modality.tokenizer

    def engine(self, model: Any, options: Any = None) -> Any:
        """What samples with `model`; the config's sampler without `options`."""
        return self.modality.engine(model, options or self.modality.options(), self.device)

    def open_engine(self) -> None:
        """Start what `rollout.engine` names.

        Raises:
            ValueError: it cannot do what the run needs.
        """
        self.remote = open_engine(self.config, self.model, self.modality, self.run_dir)
        self._pushed = None
        if self.remote is not None:
            require(self.config.rollout.engine, self.remote.capabilities(), engine_needs(self.config))
        if self.config.rollout.asynchronous:
            self.ahead = Ahead(self.modality, self.config.train.group_size)

    def rollout_engine(self, policy_version: int, splits: Sequence[tuple[int, int]] = ()) -> Engine:
        """What samples the rollouts that are learned from, with the weights of `model`, which are this version's.

        Args:
            splits: where rollouts branch, for modalities that can.
        """
        engine = self.remote
        if engine is None:
            engine = self.engine(self.model)
        else:
            engine.options = self.modality.options()
            if self._pushed != policy_version:
                started = time.perf_counter()
                # A push that fails leaves the engine without a version, and the run ends.
                layout = self.config.rollout.server.layout
                engine.push_weights(policy_version, PolicyWeights(self.model, self.tokenizer, layout))
                self._pushed = policy_version
                self.push_seconds += time.perf_counter() - started
        engine.splits = tuple(splits)
        return engine

    def save_model(self, path: str | Path) -> None:
        """Write `model` as it is now to a folder."""
        self.modality.save_model(self.model, path)

    def starting_policy(self, resumed: bool) -> Any:
        """A frozen copy of the policy RL started from; what is never trained is not copied.

        Args:
            resumed: take it from the run folder: `model` has moved on, or is about to.
        """
        if resumed:
            start = self.modality.load_model(str(self.run_dir / "warm_start"))
            share_frozen(start, self.model)
        else:
            start = trained_copy(self.model)
        return start.to(self.device).eval().requires_grad_(False)

    def spend(self, **amounts: float) -> None:
        """Add this rank's work to the run's costs; every rank must call it with the same names."""
        for name, total in distributed.sum_metrics(amounts, self.device).items():
            setattr(self.costs, name, getattr(self.costs, name) + total)

    def judge(
        self,
        rows: Sequence[Row],
        trajectories: Sequence[Any],
        group_size: int = 1,
        verifier: bool = False,
    ) -> tuple[list[Any], ScoreTable]:
        """The completion of every trajectory and its rewards; each `group_size` of them share a prompt.

        Args:
            verifier: judge by the task's own reward alone, whatever is trained on: accuracy is not a weighted or
                normalised sum. Its parameters are those of `reward.functions`, where that names it too.
        """
        completions, columns = self.modality.finished(trajectories)
        groups = [index // group_size for index in range(len(rows))]
        rewards = self.verifier if verifier else self.rewards
        columns = _row_columns(rows) | columns
        return completions, rewards.score([row["prompt"] for row in rows], completions, columns, groups=groups)

    def judge_steps(
        self,
        rows: Sequence[Row],
        trajectories: Sequence[Any],
        completions: Sequence[Any],
        table: ScoreTable,
        group_size: int = 1,
        verifier: bool = False,
    ) -> tuple[list[np.ndarray], int]:
        """The reward of every step's full fill, and how many were asked for.

        No text is asked for twice: a last fill that is the completion has its verdict, one that another fill or
        completion of the prompt is too has that one's. Rewards see fills without the columns that describe a
        trajectory. Failures, and all else that is counted, are added to the metrics of `table`.

        Args:
            completions, table: what `judge` gave.
            verifier: see `judge`.

        Returns:
            [M] float64 [T_i], NaN where a fill has no score, and the number of reward queries.
        """
        values = [np.nan if v is None else v for v in table.values]
        place: dict[tuple[int, Any], int] = {}
        for index, text in enumerate(completions):
            place.setdefault((index // group_size, text), index)
        owners: list[int] = []
        texts: list[Any] = []
        where = []
        for index, trajectory in enumerate(trajectories):
            indices = []
            fills = self.modality.fills(trajectory)
            for text in fills:
                key = (index // group_size, text)
                if key not in place:
                    place[key] = len(values) + len(texts)
                    owners.append(index)
                    texts.append(text)
                indices.append(place[key])
            if fills[-1] == completions[index]:
                indices[-1] = index
            where.append(indices)
        judged = [rows[index] for index in owners]
        rewards = self.verifier if verifier else self.rewards
        fresh = rewards.score(
            [row["prompt"] for row in judged], texts, _row_columns(judged), groups=[i // group_size for i in owners]
        )
        for name, value in fresh.metrics.items():
            if name.endswith(_COUNTS):
                table.metrics[name] = table.metrics.get(name, 0.0) + value
        every = np.array(values + [np.nan if v is None else v for v in fresh.values], dtype=np.float64)
        return [every[indices] for indices in where], len(texts)

    def rollout(
        self,
        engine: Engine,
        rows: Sequence[Row],
        group_size: int,
        seed: int,
        first: int = 0,
        steps: Sequence[int | None] | None = None,
        policy_version: int = 0,
        count: bool = True,
        verifier: bool = False,
        step_rewards: bool = False,
    ) -> ScoredRollouts:
        """Sample `group_size` rollouts of every row and score them.

        Args:
            seed: base of the per-request seeds.
            first: index of the first row over all ranks; with it, seeds do not depend on the sharding.
            steps: num_inference_steps of every row, None for the sampler's own.
            count: add the work to `costs`; evaluation does not.
            verifier: see `judge`.
            step_rewards: also score every step's full fill (`judge_steps`).
        """
        trajectories = engine.generate(self.requests(rows, group_size, seed, first, steps), policy_version)
        check_versions(trajectories, policy_version)
        return self.scored(rows, group_size, trajectories, engine.stats, count, verifier, step_rewards)

    def requests(
        self, rows: Sequence[Row], group_size: int, seed: int, first: int = 0, steps: Sequence[int | None] | None = None
    ) -> list[Any]:
        """`group_size` requests for every row; see `rollout`."""
        seeds = [[request_seed(seed, first + i, g) for g in range(group_size)] for i in range(len(rows))]
        return self.modality.requests(rows, seeds, steps)

    def scored(
        self,
        rows: Sequence[Row],
        group_size: int,
        trajectories: list[Any],
        stats: EngineStats,
        count: bool = True,
        verifier: bool = False,
        step_rewards: bool = False,
    ) -> ScoredRollouts:
        """Score the trajectories of some rows; see `rollout`.

        Args:
            stats: the work of the engine that sampled them.
        """
        started = time.perf_counter()
        repeated = [row for row in rows for _ in range(group_size)]
        completions, table = self.judge(repeated, trajectories, group_size, verifier)
        reward = torch.tensor([float("nan") if v is None else v for v in table.values], dtype=torch.float64)
        of_steps, queries = (
            self.judge_steps(repeated, trajectories, completions, table, group_size, verifier)
            if step_rewards
            else (None, 0)
        )
        overlong = torch.from_numpy(~self.modality.ended(trajectories))
        group_index = torch.arange(len(rows)).repeat_interleave(group_size)
        steps_table = None if of_steps is None else padded(of_steps)
        # A rollout with a failed fill is left out, and counted, like one whose verdict failed.
        failed = torch.tensor([bool(np.isnan(row).any()) for row in of_steps or ()], dtype=torch.bool)
        judged = reward if of_steps is None else reward.masked_fill(failed, torch.nan)
        keep, counted, filtered = keep_mask(self.config.filters, judged, group_index, overlong, steps_table)
        seconds = time.perf_counter() - started
        if count:
            self.spend(
                forward_passes=stats.forwards,
                sequence_forwards=stats.sequence_forwards,
                tokens_forwarded=stats.query_tokens,
                reward_queries=len(completions) + queries,
            )
        return ScoredRollouts(
            rows=repeated,
            trajectories=trajectories,
            completions=completions,
            table=table,
            reward=reward,
            group=group_index,
            stats=stats,
            keep=keep,
            counted=counted,
            reward_seconds=seconds,
            filtered=filtered,
            step_reward=of_steps,
        )


def _row_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """The dataset columns of some rows, as rewards get them."""
    return {name: [row.get(name) for row in rows] for name in (rows[0] if rows else {}) if name != "prompt"}


def request_seed(seed: int, row: int, sample: int) -> int:
    """A distinct non-negative int64 for every (seed, row, sample)."""
    return ((seed & 0xFFFFFFFF) << 31 | (row & 0x1FFFFF) << 10 | (sample & 0x3FF)) & 0x7FFFFFFFFFFFFFFF
