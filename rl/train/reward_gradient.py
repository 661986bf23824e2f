"""RL steps whose gradient goes through the sampler: sample with gradient -> reward with gradient -> KL -> update.

The recipe brings the sampler (`rl/modalities/gradient.py`); nothing here knows what a sample is. A rollout comes in
segments whose graphs stand alone. Each is a micro-batch of the update, back-propagated before the next one is sampled,
so only one segment's graph is held at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from rl import distributed
from rl.modalities.gradient import GradientSegment
from rl.recipes.base import AnyRecipe
from rl.tasks.chat import shown_prompt
from rl.train.rollouts import prompt_interval, request_seed, step_seed
from rl.train.run import Costs, Run
from rl.train.update import StepOutcome, Updater
from rl.values.model import Policy


class RewardGradientUpdater(Updater):
    """Maximises mean reward - kl_weight * path KL; one optimizer update per RL step.

    Attributes:
        total: rollouts of the RL step over all ranks.
        done: what was back-propagated in it, without gradient.
    """

    total: int
    done: list[GradientSegment]

    def __init__(self, run: Run, recipe: AnyRecipe, total_updates: int, resumed: bool = False):
        recipe.prepare(run)
        self.recipe, self.sampler = recipe, recipe.gradient_sampler(run)
        self.reference = Policy(run.starting_policy(resumed)) if recipe.needs_reference else None
        super().__init__(run, Policy(run.model), total_updates)

    def step(self, step: int) -> StepOutcome:
        """Sample, and take one optimizer update."""
        run, train = self.run, self.train
        started, before = time.perf_counter(), self.learner.updates
        examples = run.task.train_examples(run.config.run.seed, step, train.prompts_per_step)
        first, mine = distributed.shard(examples)
        base = step_seed(run.config.run.seed, step)
        repeated = [example for example in mine for _ in range(train.group_size)]
        seeds = [request_seed(base, first + i, g) for i in range(len(mine)) for g in range(train.group_size)]
        self.total, self.done = len(examples) * train.group_size, []
        segments: list[Iterator[GradientSegment]] = []
        for start in range(0, len(repeated), train.micro_batch_size):
            part = slice(start, start + train.micro_batch_size)
            rollout = self.sampler.segments(self.learner.forward, self.reference, repeated[part], seeds[part])
            segments += [rollout] * self.sampler.num_segments
        # Every rank has the same number of rollouts.
        norm = self.learner.update(segments, self.loss_of_next, spare=iter(()))
        self.learner.copy_weights_into(self.sampling)
        run.spend(
            Costs(
                forward_passes=sum(segment.forwards for segment in self.done),
                backward_passes=len(segments),
                sequence_forwards=sum(segment.forwards * len(segment.kl) for segment in self.done),
                tokens_forwarded=sum(segment.forwards * segment.tokens for segment in self.done),
                reward_queries=len(repeated),
            )
        )
        run.costs.updates += self.learner.updates - before
        metrics = self._metrics(self.done) | {"policy/grad_norm": norm}
        last = next(segment for segment in self.done if segment.reward is not None)
        assert last.reward is not None
        shown = zip(repeated[:2], last.completions, last.reward.tolist(), strict=False)
        samples = [
            {
                "prompt": shown_prompt(example["prompt"]),
                "completion": run.modality.sample_line(completion),
                "reward": value,
            }
            for example, completion, value in shown
        ]
        return StepOutcome(metrics, {"learn": time.perf_counter() - started}, samples)

    def loss_of_next(self, segments: Iterator[GradientSegment]) -> torch.Tensor:
        """Sample the next segment of a rollout; its share of the update's loss."""
        segment = next(segments)
        value = self.recipe.kl_weight * segment.kl.sum()
        if segment.reward is not None:
            value = value - segment.reward.sum()
        reward = None if segment.reward is None else segment.reward.detach()
        self.done.append(replace(segment, kl=segment.kl.detach(), reward=reward))
        return value / self.total

    def _metrics(self, done: list[GradientSegment]) -> dict[str, float]:
        """Means over the rollouts of all ranks, however they were cut into micro-batches."""
        rewards: list[float] = []
        means = distributed.Means()
        for segment in done:
            finished = 0
            if segment.reward is not None:
                rewards += segment.reward.tolist()
                finished = len(segment.reward)
            means.add("policy/path_kl", float(segment.kl.double().sum()), finished)
            for name, value in segment.metrics.items():
                means.add(name, value * len(segment.kl), len(segment.kl))
        parts = distributed.gather_objects(rewards)
        values = torch.tensor([value for theirs in parts for value in theirs], dtype=torch.float64)
        # Ranks hold whole prompts, one after the other.
        prompt = torch.arange(len(values)) // self.run.config.train.group_size
        return prompt_interval(values, prompt) | means.reduced() | {"rollout/samples": float(len(values))}
