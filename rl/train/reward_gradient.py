"""RL steps whose gradient goes through the sampler: sample with gradient -> reward with gradient -> KL -> update.

The recipe brings the sampler (`GradientSampler`); nothing here knows what a sample is. A rollout comes in segments
whose graphs stand alone. Each is a micro-batch of the update, back-propagated before the next one is sampled, so only
one segment's graph is held at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from rl.tasks.base import Row
from rl.train import distributed
from rl.train.learner import Learner
from rl.train.policy import Policy
from rl.train.sampling import step_seed
from rl.train.session import Session, request_seed
from rl.train.update import StepOutcome

# Inputs with `score(model)` -> what they score, under one model's weights.
Forward = Callable[[Any], Any]


@dataclass
class GradientSegment:
    """A part of the rollouts of B rows, ready to be back-propagated.

    Attributes:
        kl: [B], this part's share of the path KL to the reference, with gradient.
        reward: [B], with gradient; None in every segment but the last.
        completions: what rewards and people see; empty in every segment but the last.
        metrics: name -> mean over the rows.
    """

    kl: torch.Tensor
    reward: torch.Tensor | None = None
    completions: Sequence[Any] = ()
    metrics: dict[str, float] = field(default_factory=dict)


class GradientSampler(Protocol):
    """What samples with a gradient. A medium and its relaxation write one.

    Attributes:
        num_segments: segments of every rollout.
        forwards, reference_forwards: forwards of policy and reference per rollout.
    """

    num_segments: int
    forwards: int
    reference_forwards: int

    def segments(
        self, policy: Forward, reference: Forward | None, rows: Sequence[Row], seeds: list[int]
    ) -> Iterator[GradientSegment]:
        """Sample one rollout per row.

        Args:
            policy: runs the learner's engine.
            reference: the same through the frozen policy, None without a KL term.
            seeds: one per row; with the weights they determine the rollout.
        """
        ...


@dataclass
class GradientRecipe:
    """An algorithm that back-propagates a reward through the sampler.

    Attributes:
        sampler: makes the sampler of a run.
        kl_coef: weight of the path KL to the starting policy; 0 keeps no reference.
    """

    sampler: Callable[[Session], GradientSampler]
    kl_coef: float

    def updater(self, session: Session, total_updates: int, resumed: bool) -> RewardGradientUpdater:
        return RewardGradientUpdater(session, self, total_updates, resumed)


class RewardGradientUpdater:
    """Maximises mean reward - kl_coef * path KL; one optimizer update per RL step. A `rl.train.update.Updater`."""

    def __init__(self, session: Session, recipe: GradientRecipe, total_updates: int, resumed: bool = False):
        """
        Raises:
            ValueError: the config asks for several updates on one set of samples.
        """
        config = session.config.train
        for name in ("updates_per_step", "epochs"):
            if getattr(config, name) != 1:
                raise ValueError(
                    f"train.{name} is {getattr(config, name)}: a reward gradient samples anew for every update, set it "
                    "to 1"
                )
        self.session, self.recipe = session, recipe
        self.sampler = recipe.sampler(session)
        self.reference = Policy(session.starting_policy(resumed)) if recipe.kl_coef > 0 else None
        self.sampling = Policy(session.model)
        self.learner = Learner(self.sampling, config.deepspeed, config.optimizer, total_updates, session.device)
        self.learner.copy_weights_into(self.sampling)
        self.learners = {"policy": self.learner}

    def resumed(self, step: int) -> None:
        self.learner.copy_weights_into(self.sampling)

    def step(self, step: int) -> StepOutcome:
        """Sample, and take one optimizer update."""
        session, train = self.session, self.session.config.train
        started = time.perf_counter()
        rows = session.task.train_rows(session.config.run.seed, step, train.prompts_per_step)
        first, mine = session.shard(rows)
        base = step_seed(session.config.run.seed, step)
        repeated = [row for row in mine for _ in range(train.group_size)]
        seeds = [request_seed(base, first + i, g) for i in range(len(mine)) for g in range(train.group_size)]
        size = train.micro_batch_size
        total = len(rows) * train.group_size
        done: list[GradientSegment] = []
        losses = []
        for start in range(0, len(repeated), size):
            part = slice(start, start + size)
            segments = self.sampler.segments(self.learner.engine, self.reference, repeated[part], seeds[part])
            losses += [self._loss(segments, done, total)] * self.sampler.num_segments

        def no_padding() -> torch.Tensor:
            raise AssertionError("every rank has the same number of rollouts")

        norm = self.learner.update(losses, no_padding)
        self.learner.copy_weights_into(self.sampling)
        micro = len(losses) // self.sampler.num_segments
        forwards = self.sampler.forwards + (self.sampler.reference_forwards if self.reference else 0)
        session.spend(
            forward_passes=micro * forwards,
            backward_passes=len(losses),
            sequence_forwards=len(repeated) * forwards,
            reward_queries=len(repeated),
        )
        session.costs.updates += 1
        metrics = self._metrics(done, micro) | {"policy/grad_norm": norm}
        last = next(segment for segment in done if segment.reward is not None)
        assert last.reward is not None
        shown = zip(repeated[:2], last.completions, last.reward.tolist(), strict=False)
        samples = [
            {"prompt": row["prompt"], "completion": session.medium.sample_line(completion), "reward": value}
            for row, completion, value in shown
        ]
        return StepOutcome(metrics, {"learn": time.perf_counter() - started}, samples)

    def _loss(
        self, segments: Iterator[GradientSegment], done: list[GradientSegment], total: int
    ) -> Callable[[], torch.Tensor]:
        """A callable that samples the next segment and returns its share of the update's loss."""

        def loss() -> torch.Tensor:
            segment = next(segments)
            value = self.recipe.kl_coef * segment.kl.sum()
            if segment.reward is not None:
                value = value - segment.reward.sum()
            reward = None if segment.reward is None else segment.reward.detach()
            done.append(GradientSegment(segment.kl.detach(), reward, segment.completions, segment.metrics))
            return value / total

        return loss

    def _metrics(self, done: list[GradientSegment], micro: int) -> dict[str, float]:
        """Over all ranks."""
        rewards = [value for s in done if s.reward is not None for value in s.reward.tolist()]
        rewards = [value for part in distributed.gather_objects(rewards) for value in part]
        values = torch.tensor(rewards, dtype=torch.float64)
        half = 1.96 * float(values.std(correction=1)) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        sums = {"policy/path_kl": sum(float(s.kl.double().sum()) for s in done) / len(values)}
        for segment in done:
            for name, value in segment.metrics.items():
                sums[name] = sums.get(name, 0.0) + value / micro / distributed.world_size()
        mean = float(values.mean())
        return {
            "reward/mean": mean,
            "reward/low": mean - half,
            "reward/high": mean + half,
            **distributed.sum_metrics(sums, self.session.device),
        }
