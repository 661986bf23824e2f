"""The verdicts of rewards on rollouts, and on the x0 predictions on their way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rewards.run import RewardRunner
from rewards.table import RewardPart, ScoreTable
from rl.sections import RewardConfig, RewardPartConfig
from rl.tasks.base import Example, reward_columns

# Reward metrics that count something; every other one is a mean over completions.
_COUNTS = ("failures", "not_applicable", "timeouts", "retries", "cache_hits", "masked", "seconds")


class Judge:
    """The rewards of a run. Its methods take M examples and M trajectories, the group of a prompt together.

    Attributes:
        rewards: the rewards trained on (`RewardConfig.trained`).
        verifier: judges evaluations (`RewardConfig.judges`).
        by_rewards: the task has no verifier, so evaluations give the mean reward and no accuracy.
        names: "judge", "reward" and "measure" of a summary: math_answer, math_answer + 0.2 x overlong, accuracy.
    """

    def __init__(self, options: RewardConfig, task: Any, modality: Any):
        """Load every reward, so that a wrong name or parameter is an error before any sampling."""
        self.modality = modality
        trained, judges = options.trained(task.reward), options.judges(task.reward)
        self.by_rewards = task.reward is None and bool(options.functions)
        measure = "mean reward" if self.by_rewards else "accuracy"
        self.names = {"judge": described(judges), "reward": described(trained), "measure": measure}
        self.rewards, self.verifier = (reward_runner(parts, options).__enter__() for parts in (trained, judges))

    def close(self) -> None:
        self.rewards.close()
        self.verifier.close()

    def score(
        self, examples: Sequence[Example], trajectories: Sequence[Any], group_size: int = 1, verifier: bool = False
    ) -> tuple[list[Any], ScoreTable]:
        """The completion of every trajectory, and the verdicts on them.

        Args:
            verifier: ask the verifier in place of the rewards.
        """
        completions, columns = self.modality.finished(trajectories)
        groups = [index // group_size for index in range(len(examples))]
        columns = reward_columns(examples, columns) | columns
        prompts = [example["prompt"] for example in examples]
        table = self._runner(verifier).score(prompts, completions, columns, groups=groups)
        return completions, table

    def score_x0(
        self,
        examples: Sequence[Example],
        trajectories: Sequence[Any],
        completions: Sequence[Any],
        table: ScoreTable,
        group_size: int = 1,
        verifier: bool = False,
    ) -> tuple[list[np.ndarray], int]:
        """The reward of every step's x0 prediction, and how many were asked for.

        No text is asked for twice: a last prediction that is the completion has its verdict, and one that equals
        another prediction or completion of the prompt has that one's. Rewards see predictions without the columns that
        describe a trajectory. Failures, and all else that is counted, are added to the metrics of `table`.

        Args:
            completions, table: what `score` gave.

        Returns:
            [M] float64 [T_i], NaN where a prediction has no score, and the number of reward queries.
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
            predictions = self.modality.x0_predictions(trajectory)
            for text in predictions:
                key = (index // group_size, text)
                if key not in place:
                    place[key] = len(values) + len(texts)
                    owners.append(index)
                    texts.append(text)
                indices.append(place[key])
            if predictions[-1] == completions[index]:
                indices[-1] = index
            where.append(indices)
        judged = [examples[index] for index in owners]
        prompts, groups = [example["prompt"] for example in judged], [index // group_size for index in owners]
        fresh = self._runner(verifier).score(prompts, texts, reward_columns(judged), groups=groups)
        for name, value in fresh.metrics.items():
            if name.endswith(_COUNTS):
                table.metrics[name] = table.metrics.get(name, 0.0) + value
        every = np.array(values + [np.nan if v is None else v for v in fresh.values], dtype=np.float64)
        return [every[indices] for indices in where], len(texts)

    def _runner(self, verifier: bool) -> RewardRunner:
        return self.verifier if verifier else self.rewards


def reward_runner(parts: Sequence[RewardPartConfig], options: RewardConfig) -> RewardRunner:
    """A runner of some rewards as the section `reward` says, not entered yet."""
    return RewardRunner(
        [RewardPart(**part.model_dump()) for part in parts],
        mode=options.mode,
        num_workers=options.num_workers,
        timeout_seconds=options.timeout_seconds,
        max_failure_share=options.max_failure_share,
        outage_seconds=options.outage_seconds,
    )


def described(parts: Sequence[RewardPartConfig]) -> str:
    """Names and weights of a sum of rewards: `math_answer + 0.2 x overlong`; what is only logged is left out."""
    counted = [part for part in parts if part.weight] or parts
    return " + ".join(part.name if part.weight == 1 else f"{part.weight:g} x {part.name}" for part in counted)


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
