"""The rollouts of an RL step: sampled here or elsewhere, scored, filtered, and described in numbers."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rl import distributed
from rl.advantages import zero_variance_groups
from rl.models.compiled import compiled
from rl.models.copies import LowCopy
from rl.sections import MAX_GROUP
from rl.tasks.base import Example
from rl.tasks.chat import shown_prompt
from rl.train.ahead import Ahead
from rl.train.backslide import backslide_of
from rl.train.engines import PolicyWeights, open_engine
from rl.train.filters import keep_mask
from rl.train.judge import join_metrics
from rl.train.plan import engine_needs
from rl.train.run import Costs, Run
from rollouts.engines.base import Engine, EngineStats, check_versions, require


@dataclass
class ScoredRollouts:
    """The rollouts of this rank and their verdicts; M = prompts x group_size, a prompt's rollouts together.

    Attributes:
        completions: [M], what the modality shows to rewards (text, images).
        reward: float64 [M], NaN where there is no score.
        group: int64 [M], index of the prompt on this rank.
        keep: bool [M], rollouts that the filters leave for the update.
        counted: bool [M], rollouts that the loss is averaged over (`keep_mask`).
        process_rewards: [M] rewards of every step, None where the reward judges no steps; empty where none does.
        reward_metrics: the rewards' own numbers.
        filtered: the filters' own numbers.
        stats: work of the engine.
        reward_queries: completions and x0 predictions that were judged.
        parts: [M] what every part of the reward gave (`ScoreTable.by_completion`).
        step_reward: [M] float64 [T_i], the reward of every step's x0 prediction, where it was asked for.
        asked_steps: [M] numbers of denoising steps with `train.mixed_steps`, else empty.
    """

    examples: list[Example]
    trajectories: list[Any]
    completions: list[Any]
    reward: torch.Tensor
    group: torch.Tensor
    keep: torch.Tensor
    counted: torch.Tensor
    process_rewards: list[list[float] | None]
    reward_metrics: dict[str, float]
    filtered: dict[str, float]
    stats: EngineStats
    reward_seconds: float
    reward_queries: int
    parts: list[dict[str, float | None]]
    step_reward: list[np.ndarray] | None = None
    asked_steps: list[int] = field(default_factory=list)

    @staticmethod
    def join(parts: Sequence[ScoredRollouts]) -> ScoredRollouts:
        """Several batches of prompts as one."""
        if len(parts) == 1:
            return parts[0]
        joined = {name: _joined([vars(part)[name] for part in parts]) for name in vars(parts[0])}
        joined["group"] = joined_groups(part.group.tolist() for part in parts)
        joined["reward_metrics"] = join_metrics([(part.reward_metrics, len(part.completions)) for part in parts])
        joined["stats"] = EngineStats(**_joined([vars(part.stats) for part in parts]))
        return ScoredRollouts(**joined)

    def lines(self, modality: Any, chosen: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Texts, reward and its parts of the chosen rollouts, of all without `chosen`, as plain JSON."""
        reward = self.reward.tolist()
        return [
            {
                "prompt": self.examples[i]["prompt"],
                "completion": modality.sample_line(self.completions[i]),
                **({"answer": self.examples[i]["answer"]} if self.examples[i].get("answer") is not None else {}),
                "reward": None if reward[i] != reward[i] else reward[i],
                "parts": self.parts[i],
            }
            for i in (range(len(reward)) if chosen is None else chosen)
        ]


def joined_groups(parts: Iterable[Sequence[int]]) -> torch.Tensor:
    """int64 [M]: group indices of several parts, each of which counts from 0, as one sequence that does."""
    joined: list[int] = []
    for part in parts:
        offset = max(joined, default=-1) + 1
        joined += [offset + group for group in part]
    return torch.tensor(joined, dtype=torch.int64)


def padded(rows: Sequence[np.ndarray]) -> torch.Tensor:
    """float64 [M, T] from M rows of unequal lengths, NaN behind the end of each."""
    width = max((len(row) for row in rows), default=0)
    table = torch.full((len(rows), width), torch.nan, dtype=torch.float64)
    for into, row in zip(table, rows, strict=True):
        into[: len(row)] = torch.from_numpy(row)
    return table


def _joined(values: Sequence[Any]) -> Any:
    """Lists and tensors one after the other; sums of numbers, and of the entries of dicts."""
    first = values[0]
    if isinstance(first, list):
        return [item for value in values for item in value]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(values))
    if isinstance(first, dict):
        names = dict.fromkeys(name for value in values for name in value)
        return {name: sum(value.get(name, 0.0) for value in values) for name in names}
    return sum(values) if isinstance(first, int | float) else None


def request_seed(seed: int, row: int, sample: int) -> int:
    """A distinct non-negative int64 for every (seed, row, sample); sample < MAX_GROUP."""
    assert 0 <= sample < MAX_GROUP, "seeds would repeat"
    return ((seed & 0xFFFFFFFF) << 31 | (row & 0x1FFFFF) << 10 | (sample & 0x3FF)) & 0x7FFFFFFFFFFFFFFF


def step_seed(seed: int, step: int) -> int:
    """Base of the request seeds of an RL step."""
    return seed * 1_000_003 + step + 1


def requests(
    run: Run,
    examples: Sequence[Example],
    group_size: int,
    seed: int,
    first: int = 0,
    steps: Sequence[int] | None = None,
) -> list[Any]:
    """`group_size` requests for every example.

    Args:
        seed: base of the per-request seeds.
        first: index of the first example over all ranks; with it, seeds do not depend on the sharding.
        steps: num_inference_steps of every example, None for the sampler's own.
    """
    seeds = [[request_seed(seed, first + i, g) for g in range(group_size)] for i in range(len(examples))]
    return run.modality.requests(examples, seeds, steps)


def rollout(run: Run, engine: Engine, examples: Sequence[Example], group_size: int, seed: int) -> ScoredRollouts:
    """Sample `group_size` rollouts of every example and score them."""
    trajectories = engine.generate(requests(run, examples, group_size, seed))
    return scored(run, examples, group_size, trajectories, engine.stats)


def scored(
    run: Run,
    examples: Sequence[Example],
    group_size: int,
    trajectories: list[Any],
    stats: EngineStats,
    step_rewards: bool = False,
) -> ScoredRollouts:
    """Score and filter the trajectories of some examples, `group_size` of each.

    Args:
        stats: work of the engine that sampled them.
        step_rewards: also score every step's x0 prediction.
    """
    started = time.perf_counter()
    repeated = [example for example in examples for _ in range(group_size)]
    completions, table = run.judge.score(repeated, trajectories, group_size)
    reward = torch.tensor([float("nan") if v is None else v for v in table.values], dtype=torch.float64)
    of_steps, queries, judged = None, 0, reward
    if step_rewards:
        of_steps, queries = run.judge.score_x0(repeated, trajectories, completions, table, group_size)
        # A rollout with a failed prediction is left out, and counted, like one whose verdict failed.
        failed = torch.tensor([bool(np.isnan(row).any()) for row in of_steps], dtype=torch.bool)
        judged = reward.masked_fill(failed, torch.nan)
    group = torch.arange(len(examples)).repeat_interleave(group_size)
    overlong = torch.from_numpy(~run.modality.ended(trajectories))
    steps_table = None if of_steps is None else padded(of_steps)
    keep, counted, filtered = keep_mask(run.config.filters, judged, group, overlong, steps_table)
    return ScoredRollouts(
        examples=repeated,
        trajectories=trajectories,
        completions=completions,
        reward=reward,
        group=group,
        keep=keep,
        counted=counted,
        process_rewards=table.steps,
        reward_metrics=table.metrics,
        filtered=filtered,
        stats=stats,
        reward_seconds=time.perf_counter() - started,
        reward_queries=len(completions) + queries,
        parts=table.by_completion(),
        step_reward=of_steps,
    )


class RolloutSource:
    """Samples the rollouts that are learned from. Use as a context manager.

    Attributes:
        remote: the engine elsewhere that samples; None when the model of this process does.
        ahead: the rollouts of the next step, when they are sampled beside the learner.
        push_seconds: time that pushing weights to `remote` took so far.
    """

    def __init__(self, run: Run):
        """A source that samples with the model of this process."""
        self.run = run
        self.remote: Engine | None = None
        self.ahead: Ahead | None = None
        self.push_seconds = 0.0
        self._pushed: int | None = None
        self._low: LowCopy | None = None
        self._sampler: Any = None

    @classmethod
    def open(cls, run: Run) -> RolloutSource:
        """Start the engine that `rollout.engine` names, where there are RL steps to take.

        Raises:
            ValueError: it cannot do what the run needs.
        """
        source, rollout = cls(run), run.config.rollout
        if not run.config.train.steps:
            return source
        source.remote = open_engine(run.config, run.model, run.modality, run.folder)
        if source.remote is not None:
            try:
                require(rollout.engine, source.remote.capabilities(), engine_needs(run.config))
            except BaseException:
                source.remote.close()
                raise
        if rollout.asynchronous:
            source.ahead = Ahead(run.modality, run.config.train.group_size)
        return source

    def __enter__(self) -> RolloutSource:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.remote is not None:
            self.remote.close()
        if self.ahead is not None:
            self.ahead.close()

    def sample(self, step: int, policy_version: int) -> ScoredRollouts:
        """The scored rollouts of this rank; batches of prompts are added while the filters leave too few of them.

        With `rollout.asynchronous` they were sampled while the last step learned, by older weights than
        `policy_version`; the rollouts of the next step are begun before this returns.
        """
        run, config = self.run, self.run.config
        recipe = config.algorithm
        parts: list[ScoredRollouts] = []
        kept = 0.0
        for turn in range(1 + config.filters.refill_rounds):
            examples, asked = self._asked(step, turn)
            if self.ahead is None:
                engine = self._engine(policy_version, step)
                trajectories = engine.generate(asked, policy_version)
                check_versions(trajectories, policy_version)
                stats = engine.stats
            else:
                if not self.ahead.begun():
                    self.ahead.begin(self._engine(policy_version, step), asked, policy_version)
                trajectories, stats = self.ahead.take()
                if step + 1 < config.train.steps:
                    engine = self._engine(policy_version, step + 1)
                    self.ahead.begin(engine, self._asked(step + 1)[1], policy_version)
            part = scored(run, examples, config.train.group_size, trajectories, stats, recipe.needs_step_rewards)
            if config.train.mixed_steps:
                part.asked_steps = [request.num_inference_steps for request in asked]
            run.spend(
                Costs(
                    forward_passes=stats.forwards,
                    sequence_forwards=stats.sequence_forwards,
                    tokens_forwarded=stats.query_tokens,
                    reward_queries=part.reward_queries,
                )
            )
            parts.append(part)
            kept += distributed.reduce_number(len(part.group[part.keep].unique()), "sum", run.device)
            if kept >= config.train.prompts_per_step:
                break
        return ScoredRollouts.join(parts)

    def _engine(self, policy_version: int, step: int) -> Engine:
        """An engine for an RL step's rollouts, with the weights of the run's model, which are this version's."""
        run, engine, recipe = self.run, self.remote, self.run.config.algorithm
        options = recipe.sampler_options(run.modality.options(), step)
        if engine is None:
            engine = run.engine(self._sampling(policy_version), options)
        else:
            engine.options = options
            if self._pushed != policy_version:
                started = time.perf_counter()
                # A push that fails leaves the engine without a version, and the run ends.
                layout = run.config.rollout.server.layout
                engine.push_weights(policy_version, PolicyWeights(run.model, run.tokenizer, layout))
                self._pushed = policy_version
                self.push_seconds += time.perf_counter() - started
        engine.branch_points = tuple(recipe.branch_points(step))
        return engine

    def _sampling(self, policy_version: int) -> Any:
        """The model that samples in this process: the run's or its copy with 8-bit weights, compiled or not."""
        rollout = self.run.config.rollout
        if self._sampler is None:
            if rollout.quantize != "none":
                self._low = LowCopy(self.run.model, rollout.quantize)
            model = self._low.model if self._low else self.run.model
            self._sampler = compiled(model) if rollout.compile else model
        elif self._low is not None and self._pushed != policy_version:
            self._low.refresh()
        self._pushed = policy_version
        return self._sampler

    def _asked(self, step: int, turn: int = 0) -> tuple[list[Example], list[Any]]:
        """This rank's examples of an RL step and the requests for them; refills are turns 1, 2, ..."""
        run, train, seed = self.run, self.run.config.train, self.run.config.run.seed
        start = turn * train.prompts_per_step
        count = train.prompts_per_step * (1 + run.config.filters.refill_rounds)
        examples = run.task.train_examples(seed, step, count)
        first, mine = distributed.shard(examples[start : start + train.prompts_per_step])
        first += start
        choices = train.mixed_steps
        steps: list[int] | None = None
        if choices:
            steps = [random.Random(f"steps {seed} {step} {first + i}").choice(choices) for i in range(len(mine))]
        return mine, requests(run, mine, train.group_size, step_seed(seed, step), first, steps)


def sample_lines(run: Run, rollouts: ScoredRollouts) -> list[dict[str, Any]]:
    """The first two rollouts of this rank, then the worst and the best of the others, as plain JSON."""
    order = [i for i in rollouts.reward.argsort(stable=True).tolist() if i > 1 and not rollouts.reward[i].isnan()]
    chosen = [*range(min(2, len(rollouts.examples))), *dict.fromkeys([*order[:1], *order[-1:]])]
    lines = rollouts.lines(run.modality, chosen)
    for line, index in zip(lines, chosen, strict=True):
        line |= {"prompt": shown_prompt(line["prompt"]), "num_steps": rollouts.trajectories[index].num_steps}
        if rollouts.examples[index].get("answer") is not None:
            line["answer"] = shown_prompt(rollouts.examples[index]["answer"])
    return lines


def rollout_metrics(rollouts: ScoredRollouts, device: torch.device) -> dict[str, float]:
    """Over all ranks: reward mean with a 95 % interval over prompts, failures, zero-variance groups, the rewards' and
    the filters' own numbers, tokens generated, and the share of forwarded rows that were distinct.
    """
    parts = distributed.gather_objects((rollouts.reward.tolist(), rollouts.group.tolist(), rollouts.asked_steps))
    rewards = torch.tensor([value for values, _, _ in parts for value in values], dtype=torch.float64)
    groups = joined_groups(part for _, part, _ in parts)
    asked = torch.tensor([steps for _, _, part in parts for steps in part])
    by_steps = {f"reward/mean@{s}": float(rewards[asked == s].nanmean()) for s in sorted(set(asked.tolist()))}
    filtered = distributed.sum_metrics(rollouts.filtered, device)
    work = distributed.sum_metrics(vars(rollouts.stats), device)
    slid, steps = {}, None
    if rollouts.step_reward is not None:
        everywhere = [s for part in distributed.gather_objects(rollouts.step_reward) for s in part]
        steps = padded(everywhere)
        slid = {f"rollout/backslide_{name}": value for name, value in vars(backslide_of(everywhere)).items()}
    if work["image_probes"]:
        slid["rollout/image_gap"] = work["image_gap"] / work["image_probes"]
    return {
        **slid,
        **join_metrics(distributed.gather_objects((rollouts.reward_metrics, len(rollouts.completions)))),
        **filtered,
        "rollout/tokens": work["generated_tokens"],
        "rollout/samples": float(len(rewards)),
        **{f"rollout/{name}": work[name] for name in ("retries", "repushes", "workers_lost", "requests_reassigned")},
        "speed/distinct_row_share": work["sequence_forwards"] / max(work["rows_asked"], 1),
        **prompt_interval(rewards, groups),
        **{name: mean for name, mean in by_steps.items() if mean == mean},
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
