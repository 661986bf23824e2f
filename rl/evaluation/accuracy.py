"""Greedy accuracy on held-out prompts at several numbers of denoising steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rl.evaluation.backslide import Backslide, backslide_of
from rl.evaluation.intervals import wilson_interval
from rl.tasks.base import Row
from rl.train import distributed
from rl.train.rollouts import ScoredRollouts, rollout
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
    run: Run, model: Any, rows: Sequence[Row], step_counts: Sequence[int], temperature: float = 0.0
) -> tuple[dict[int, Accuracy], dict[int, ScoredRollouts]]:
    """Decode every row once per step count.

    Returns:
        step count -> accuracy over all ranks, and step count -> this rank's rollouts.
    """
    first, mine = distributed.shard(rows)
    results: dict[int, Accuracy] = {}
    rollouts: dict[int, ScoredRollouts] = {}
    backslide = run.config.eval.backslide
    for steps in step_counts:
        engine = run.engine(model, run.modality.evaluation_options(steps, temperature))
        scored = rollout(run, engine, mine, 1, seed=0, first=first, verifier=True, step_rewards=backslide)
        values = [v for part in distributed.gather_objects(scored.reward.tolist()) for v in part]
        judged = [v for v in values if v == v]
        right = sum(v >= 1.0 for v in judged)
        low, high = wilson_interval(right, len(judged)) if judged else (0.0, 1.0)
        work = distributed.sum_metrics(vars(engine.stats), run.device)
        results[steps] = Accuracy(
            steps,
            right / len(judged) if judged else float("nan"),
            low,
            high,
            len(judged),
            len(values) - len(judged),
            work["sequence_forwards"],
            # Sharing a forward with an equal canvas is no property of the decoder.
            work["generated_tokens"] / max(work["rows_asked"], 1),
            backslide_of([s for part in distributed.gather_objects(scored.step_reward) for s in part])
            if backslide
            else None,
        )
        rollouts[steps] = scored
    return results, rollouts


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
