"""The input of a runner and its output: `RewardPart`, `ScoreTable`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards.combine import NORMALIZATIONS
from rewards.score import Score

MODES = ("inline", "process")


@dataclass(frozen=True)
class RewardPart:
    """One reward of a sum.

    Example: `RewardPart("math_answer", weight=1.0)`, `RewardPart("my_rewards.py:brevity", weight=0.1)`,
    `RewardPart("math_answer", columns={"answer": "ground_truth"})`.

    Attributes:
        name: any name `rewards.load.load_reward` takes.
        weight: factor of this part in the sum; 0 logs the part without using it.
        params: parameters of the reward.
        normalize: "none", "group" or "batch", applied before weighting (`rewards.combine.normalize`).
        label: name in metrics; the last piece of `name` when not given.
        mode: "inline" or "process" for this part alone; the runner's mode when None.
        columns: argument of the reward -> dataset column that feeds it, where the names differ.
        batch_size: completions per call; None is all of them inline and up to 16 in a worker.
    """

    name: str
    weight: float = 1.0
    params: Mapping[str, Any] = field(default_factory=dict)
    normalize: str = "none"
    label: str | None = None
    mode: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.normalize not in NORMALIZATIONS:
            raise ValueError(f"reward '{self.name}': normalize must be one of {', '.join(NORMALIZATIONS)}")
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"reward '{self.name}': mode must be one of {', '.join(MODES)}, got '{self.mode}'")
        if not math.isfinite(self.weight):
            raise ValueError(f"reward '{self.name}': weight must be finite, got {self.weight}")
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"reward '{self.name}': batch_size must be at least 1, got {self.batch_size}")

    @property
    def key(self) -> str:
        """Name in metrics and in `ScoreTable.parts`."""
        return self.label or self.name.rpartition(":")[2].removesuffix("()")


@dataclass
class ScoreTable:
    """Verdicts on one batch of B completions.

    Example: `ScoreTable(values=[1.0, None], parts={"sudoku": [Score(1.0), Score(None, reason="timeout ...")]}, ...)`.

    Attributes:
        values: [B] combined reward; None where the completion is masked out of the update.
        parts: part key -> [B] scores, before normalisation and weights.
        metrics: numbers to log (glossary in rewards/README.md).
        steps: [B] combined per-step rewards; None where no part judges steps.
        extra: columns that rewards logged with TRL's `log_extra`, [B] each, None where not given.
    """

    values: list[float | None]
    parts: dict[str, list[Score]]
    metrics: dict[str, float]
    steps: list[list[float] | None] = field(default_factory=list)
    extra: dict[str, list[Any]] = field(default_factory=dict)

    def by_completion(self) -> list[dict[str, float | None]]:
        """[B] what every part gave a completion: `{"sudoku": 1.0, "overlong": None}`."""
        return [{key: scores[i].value for key, scores in self.parts.items()} for i in range(len(self.values))]


@dataclass
class PartTally:
    """Running account of one part while a batch is scored; `scores[i]` is None until completion i is settled."""

    scores: list[Score | None]
    cache_hits: int = 0
    retries: int = 0
    seconds: float = 0.0
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def settled(self) -> list[Score]:
        """All scores, once every completion has one."""
        scores = [score for score in self.scores if score is not None]
        assert len(scores) == len(self.scores), "a completion was left without a verdict"
        return scores

    def summary(self, key: str) -> dict[str, float]:
        """Metrics of this part under `reward/<key>/...`."""
        scores = self.settled()
        numbers: dict[str, Sequence[float]] = dict(self.metrics)
        for name in {name for score in scores for name in score.metrics}:
            numbers[name] = [float(score.metrics[name]) for score in scores if name in score.metrics]
        numbers["mean"] = [score.value for score in scores if score.value is not None]
        summary = {name: math.fsum(values) / len(values) for name, values in numbers.items() if values}
        failures = sum(score.failed for score in scores)
        summary |= {
            "failures": float(failures),
            "failure_share": failures / max(1, len(scores)),
            "not_applicable": float(sum(not score.applicable for score in scores)),
            "timeouts": float(sum(score.failed and str(score.reason).startswith("timeout") for score in scores)),
            "retries": float(self.retries),
            "cache_hits": float(self.cache_hits),
            "seconds": self.seconds,
        }
        return {f"reward/{key}/{name}": value for name, value in summary.items()}
