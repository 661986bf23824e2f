"""Greedy accuracy, or mean reward, on held-out examples at several numbers of denoising steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rl import distributed
from rl.evaluation.answers import Evaluator, Problem
from rl.evaluation.figures import figures
from rl.evaluation.generations import Generation
from rl.tasks.base import Example
from rl.track.intervals import t_half_width
from rl.train.backslide import Backslide, backslide_of
from rl.train.run import Run


@dataclass
class Accuracy:
    """The verdict on the held-out prompts at one number of steps.

    Attributes:
        measure: "accuracy", the share of prompts to which the task's verifier gives at least 1; "mean reward" where the
            rewards trained on judge (`Judge.by_rewards`).
        value, low, high: the measure and its 95 % interval: Wilson's, or a t interval over prompts.
        unscored: prompts without a score; they count in no other number.
        tokens_per_forward: see `rl.evaluation.figures.Figures`.
        backslide: with `eval.backslide`.
        reported: mean of everything that the judge reported beside its score.
    """

    steps: int
    measure: str
    value: float
    low: float
    high: float
    num_prompts: int
    unscored: int
    forward_passes: float
    tokens_per_forward: float
    backslide: Backslide | None = None
    reported: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """All fields, `value` under the name of the measure: `accuracy` or `mean_reward`."""
        fields = asdict(self)
        return {fields.pop("measure").replace(" ", "_"): fields.pop("value")} | fields


def evaluate(
    run: Run, examples: Sequence[Example], step_counts: Sequence[int]
) -> tuple[dict[int, Accuracy], dict[int, list[Generation]]]:
    """Decode every example once for each step count, on all ranks together.

    Returns:
        step count -> accuracy, and step count -> the completions, in the order of the examples.
    """
    requests = run.modality.requests(examples, [[0]] * len(examples), None)
    problems = [Problem(str(i), *pair) for i, pair in enumerate(zip(examples, requests, strict=True))]
    backslide = run.config.eval.backslide
    evaluator = Evaluator(run, problems, run.judge.verifier, seed=0, every_step=backslide)
    results: dict[int, Accuracy] = {}
    completions: dict[int, list[Generation]] = {}
    for steps in step_counts:
        engine = run.engine(run.model, run.modality.evaluation_options(steps))
        _, mine = distributed.shard([(index, 0) for index in range(len(problems))])
        answers = evaluator.ask(engine, str(steps), mine)
        parts = distributed.gather_objects((answers.generations, answers.step_reward))
        completions[steps] = [generation for part, _ in parts for generation in part]
        figure = figures(completions[steps], [])
        work = distributed.sum_metrics(answers.stats, run.device)
        value = (figure.avg, figure.low, figure.high)
        if run.judge.by_rewards:
            rewards = [answer.reward for answer in completions[steps] if answer.reward is not None]
            half = t_half_width(rewards) if len(rewards) > 1 else math.nan
            value = (figure.mean_reward, figure.mean_reward - half, figure.mean_reward + half)
        results[steps] = Accuracy(
            steps,
            run.judge.names["measure"],
            *value,
            figure.num_problems,
            figure.unscored,
            work["sequence_forwards"],
            figure.tokens_per_forward,
            backslide_of([reward for _, part in parts for reward in part]) if backslide else None,
            figure.metrics,
        )
    return results, completions


def task_measures(
    run: Run, examples: Sequence[Example], result: Accuracy, completions: Sequence[Generation]
) -> dict[str, float]:
    """What the task measures of its answers beside the verdict, such as shares by length; empty for most tasks."""
    if not hasattr(run.task, "measure"):
        return {}
    measured: dict[str, float] = run.task.measure(examples, [made.completion for made in completions], result.reported)
    return measured


def as_metrics(results: dict[int, Accuracy]) -> dict[str, float]:
    """`eval/accuracy@4` or `eval/reward@4`, and its interval, for metrics.jsonl."""
    metrics: dict[str, float] = {}
    for steps, result in results.items():
        name = f"eval/{result.measure.removeprefix('mean ')}"
        for suffix, value in (("", result.value), ("_low", result.low), ("_high", result.high)):
            metrics[f"{name}{suffix}@{steps}"] = value
        metrics[f"eval/unscored@{steps}"] = result.unscored
        if result.backslide is not None:
            metrics |= {f"eval/backslide_{name}@{steps}": value for name, value in vars(result.backslide).items()}
    return metrics
