"""Score batches with one or several rewards, whatever the rewards do.

A reward that raises, hangs, crashes, exits or forks costs its own completions their score, and nothing else: they
are counted, masked (value None) and reported; above a set share the run stops with the reason.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Generator, Hashable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rewards.cache import ScoreCache
from rewards.call import Outcome, call_reward
from rewards.combine import normalize, weighted_steps, weighted_sum
from rewards.failures import FailureLimit
from rewards.jobs import Batch, Job
from rewards.load import load_reward
from rewards.pool import WorkerPool
from rewards.score import RewardFunction, Score
from rewards.table import MODES, PartTally, RewardPart, ScoreTable

logger = logging.getLogger(__name__)


class RewardRunner:
    """Scores batches; a context manager, since it may own worker processes.

    A call that fails for a whole batch is repeated one completion at a time, so that one poisoned completion
    costs one score. Transient failures (`TransientRewardError`, connection errors, `Score(..., transient=True)`)
    are retried `retries` times with a doubling pause.

    Args:
        parts: the rewards to sum.
        mode: "inline" calls rewards in this process: fastest, for rewards you trust, and a hang is a hang.
            "process" calls them in `num_workers` child processes that are killed and replaced when stuck.
        num_workers: child processes, shared by all parts.
        timeout_seconds: wall limit of one call in process mode (the CPU limit follows from it). Imports that a reward
            makes inside a call do not count; `load_seconds` limits them.
        max_failure_share: raise `RewardFailureError` when more than this share of a part's latest 256 verdicts
            (at least a whole batch) failed; 0 tolerates none, 1 all.
        cache_size: scores to remember by content; only for rewards that always judge the same the same.
        retries: further attempts after a transient failure.
        retry_seconds: pause before the first retry.
        outage_seconds: how long to go on retrying beyond `retries`, every half minute at last, from the first
            transient failure of a batch on: a reward server that died is waited for.
        memory_mb: memory limit of one child process in MiB; None for no limit.
        load_seconds: wall limit for a child process to start and load a reward.

    Raises:
        ValueError: for a bad option or, on entering, a reward that cannot be loaded.
    """

    def __init__(
        self,
        parts: Sequence[RewardPart],
        mode: str = "inline",
        num_workers: int = 1,
        timeout_seconds: float = 10.0,
        max_failure_share: float = 0.2,
        cache_size: int = 0,
        retries: int = 2,
        retry_seconds: float = 0.5,
        outage_seconds: float = 0.0,
        memory_mb: int | None = 4096,
        load_seconds: float = 120.0,
    ) -> None:
        _check_options(parts, mode, num_workers, timeout_seconds, max_failure_share, retries)
        self.parts = list(parts)
        self.keys = [part.key for part in parts]
        self.retries = retries
        self.retry_seconds = retry_seconds
        self.outage_seconds = outage_seconds
        self._waiting_until: float | None = None
        self._inline = [(part.mode or mode) == "inline" for part in parts]
        self._functions: list[RewardFunction | None] = [None] * len(parts)
        self._limits = [FailureLimit(key, max_failure_share) for key in self.keys]
        self._cache = ScoreCache(cache_size)
        self._num_workers = num_workers
        self._process_limits = (timeout_seconds, memory_mb, load_seconds)
        self._pool: WorkerPool | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> RewardRunner:
        """Load every reward now, so that a wrong name or parameter is an error before any sampling."""
        for index, part in enumerate(self.parts):
            if self._inline[index]:
                self._functions[index] = load_reward(part.name, part.params)
        apart = {i: part for i, part in enumerate(self.parts) if not self._inline[i]}
        if apart:
            self._pool = WorkerPool(apart, self._num_workers, *self._process_limits)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill the workers and whatever they started."""
        self.close()

    def close(self) -> None:
        """Kill the workers and whatever they started, close inline rewards; the runner can be entered again."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
        for index, function in enumerate(self._functions):
            self._functions[index] = None
            close = getattr(function, "close", None)  # a reward that holds processes or connections
            if close is not None:
                close()

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]] | None = None,
        groups: Sequence[Hashable] | None = None,
        trainer_state: Any = None,
    ) -> ScoreTable:
        """Judge B completions with every part.

        Args:
            prompts: [B] str or chat message lists.
            completions: [B] the same, or whatever a modality makes; None is a damaged sample, which fails unjudged.
            columns: dataset columns, each [B], plus `completion_ids` and whatever the trainer adds.
            groups: [B] which prompt group each completion belongs to, for `normalize="group"`; equal prompts
                form a group when not given.
            trainer_state: handed to rewards as `trainer_state`, as TRL does.

        Raises:
            ValueError: when lengths differ.
            RewardFailureError: when a part failed too often.
        """
        start = time.perf_counter()
        batch = Batch(list(prompts), list(completions), dict(columns or {}), trainer_state)
        with self._lock:  # workers answer one batch at a time
            tallies = self._settle(batch)

        scores = {key: tally.settled() for key, tally in zip(self.keys, tallies, strict=True)}
        weights = {key: part.weight for key, part in zip(self.keys, self.parts, strict=True)}
        group_of = [json.dumps(prompt, default=repr) for prompt in prompts] if groups is None else groups
        normalized = {
            key: normalize([score.value for score in scores[key]], part.normalize, group_of)
            for key, part in zip(self.keys, self.parts, strict=True)
        }
        failed = {key: [score.failed for score in scores[key]] for key in self.keys}
        values = weighted_sum(normalized, weights, failed)

        metrics = {
            name: value
            for key, tally in zip(self.keys, tallies, strict=True)
            for name, value in tally.summary(key).items()
        }
        present = [value for value in values if value is not None]
        if present:
            metrics["reward/mean"] = math.fsum(present) / len(present)
        metrics["reward/masked"] = float(len(values) - len(present))
        metrics["reward/seconds"] = time.perf_counter() - start
        return ScoreTable(values, scores, metrics, weighted_steps(scores, weights), batch.extra)

    def _settle(self, batch: Batch) -> list[PartTally]:
        """Every part's verdict on every completion, through cache, calls, isolation and retries."""
        tallies = [PartTally([None] * len(batch)) for _ in self.parts]
        jobs: list[Job] = []
        twins: list[dict[int, int]] = []
        for part in range(len(self.parts)):
            known, fresh, same = self._cache.split(self.keys[part], batch)
            for index, score in known.items():
                tallies[part].scores[index] = score
            tallies[part].cache_hits = len(batch) - len(fresh)
            for index in [index for index in fresh if batch.completions[index] is None]:
                fresh.remove(index)
                self._book(part, index, Score(None, reason="the sample is damaged"), batch, tallies[part])
            twins.append(same)
            size = self._call_size(part, len(fresh))
            jobs += [Job(part, fresh[at : at + size]) for at in range(0, len(fresh), size)]

        pause = self.retry_seconds
        self._waiting_until = None
        while jobs:
            later: list[Job] = []
            with contextlib.closing(self._execute(jobs, batch)) as outcomes:  # closing kills what is still busy
                for job, outcome in outcomes:
                    later += self._absorb(job, outcome, batch, tallies[job.part])
            jobs = later
            if any(job.attempt for job in jobs):
                if any(job.attempt == self.retries + 1 for job in jobs):
                    logger.warning("a reward's server is down: waiting for it for up to %g s", self.outage_seconds)
                time.sleep(pause)
                pause = min(2 * pause, 30.0)

        for tally, same in zip(tallies, twins, strict=True):
            for index, original in same.items():
                tally.scores[index] = tally.scores[original]
        return tallies

    def _call_size(self, part: int, count: int) -> int:
        size = self.parts[part].batch_size
        if size is not None:
            return size
        return max(1, count if self._inline[part] else min(16, math.ceil(count / self._num_workers)))

    def _execute(self, jobs: Sequence[Job], batch: Batch) -> Generator[tuple[Job, Outcome], None, None]:
        apart = [job for job in jobs if not self._inline[job.part]]
        if apart:
            assert self._pool is not None, "enter the runner first: `with RewardRunner(...) as runner:`"
            with contextlib.closing(self._pool.run(apart, batch)) as outcomes:
                yield from outcomes
        for job in jobs:
            if not self._inline[job.part]:
                continue
            function = self._functions[job.part]
            assert function is not None, "enter the runner first: `with RewardRunner(...) as runner:`"
            prompts, completions, columns = batch.select(job.indices, self.parts[job.part].columns)
            yield job, call_reward(function, prompts, completions, columns, batch.trainer_state)

    def _absorb(self, job: Job, outcome: Outcome, batch: Batch, tally: PartTally) -> list[Job]:
        """Book one call; return the calls it makes necessary."""
        tally.seconds += outcome.seconds
        if outcome.error is not None:
            if outcome.transient and self._another(job):
                tally.retries += len(job.indices)
                return [Job(job.part, job.indices, job.attempt + 1)]
            # One score for all would pass as the score of each.
            if len(job.indices) > 1 and not outcome.transient and not outcome.miscounted:
                return [Job(job.part, [index], job.attempt) for index in job.indices]
            for index in job.indices:
                self._book(job.part, index, Score(None, reason=outcome.error), batch, tally)
            return []

        for name, values in outcome.metrics.items():
            tally.metrics.setdefault(name, []).extend(values)
        for column, entries in outcome.extra.items():
            stored = batch.extra.setdefault(column, [None] * len(batch))
            for index, entry in zip(job.indices, entries, strict=True):
                stored[index] = entry
        again: list[int] = []
        for index, score in zip(job.indices, outcome.scores, strict=True):
            if score.failed and score.transient and self._another(job):
                again.append(index)
            else:
                self._book(job.part, index, score, batch, tally)
        tally.retries += len(again)
        return [Job(job.part, again, job.attempt + 1)] if again else []

    def _another(self, job: Job) -> bool:
        """Whether a transient failure is tried again."""
        if self._waiting_until is None:
            self._waiting_until = time.monotonic() + self.outage_seconds
        return job.attempt < self.retries or time.monotonic() < self._waiting_until

    def _book(self, part: int, index: int, score: Score, batch: Batch, tally: PartTally) -> None:
        tally.scores[index] = score
        self._cache.put(self.keys[part], batch, index, score)
        self._limits[part].book(score, len(batch))


def _check_options(
    parts: Sequence[RewardPart],
    mode: str,
    num_workers: int,
    timeout_seconds: float,
    max_failure_share: float,
    retries: int,
) -> None:
    if not parts:
        raise ValueError("reward.parts is empty; name at least one reward")
    repeated = [key for key, count in Counter(part.key for part in parts).items() if count > 1]
    if repeated:
        raise ValueError(f"two reward parts are called '{repeated[0]}'; give one of them a `label`")
    if mode not in MODES:
        raise ValueError(f"reward.mode must be one of {', '.join(MODES)}, got '{mode}'")
    if num_workers < 1:
        raise ValueError(f"reward.num_workers must be at least 1, got {num_workers}")
    if timeout_seconds <= 0:
        raise ValueError(f"reward.timeout_seconds must be positive, got {timeout_seconds}")
    if not 0 <= max_failure_share <= 1:
        raise ValueError(f"reward.max_failure_share must lie in [0, 1], got {max_failure_share}")
    if retries < 0:
        raise ValueError(f"reward.retries must not be negative, got {retries}")
