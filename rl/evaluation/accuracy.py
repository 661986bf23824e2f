"""Greedy accuracy on held-out examples at several numbers of denoising steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rl.evaluation.answers import Evaluator, Problem
from rl.evaluation.backslide import Backslide, backslide_of
from rl.evaluation.figures import figures
from rl.evaluation.generations import Generation
from rl.tasks.base import Row
from rl.train import distributed
from rl.train.run import Run


@dataclass
class Accuracy:
    """Share of prompts to which the task's own reward gives at least 1, with its 95 % Wilson interval.

    A prompt without a score counts in `unscored` and in no share. `backslide` is there with `eval.backslide`.
    """

    steps: int
    accuracy: float
    low: float
    high: float
    num_prompts: int
    unscored: int
    forward_passes: float
    tokens_per_forward: float
    backslide: Backslide | None = None


def evaluate(
    run: Run, examples: Sequence[Row], step_counts: Sequence[int]
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
        results[steps] = Accuracy(
            steps,
            figure.avg,
            figure.low,
            figure.high,
            figure.num_problems,
            figure.unscored,
            work["sequence_forwards"],
            # Sharing a forward with an equal canvas is no property of the decoder.
            work["generated_tokens"] / max(work["rows_asked"], 1),
            backslide_of([reward for _, part in parts for reward in part]) if backslide else None,
        )
    return results, completions


def as_metrics(results: dict[int, Accuracy]) -> dict[str, float]:
    """`eval/accuracy@4` and its interval, for metrics.jsonl."""
    metrics = {}
    for steps, result in results.items():
        metrics[f"eval/accuracy@{steps}"] = result.accuracy
        metrics[f"eval/accuracy_low@{steps}"] = result.low
        metrics[f"eval/accuracy_high@{steps}"] = result.high
        metrics[f"eval/unscored@{steps}"] = result.unscored
        if result.backslide is not None:
            metrics |= {f"eval/backslide_{name}@{steps}": value for name, value in vars(result.backslide).items()}
    return metrics
