"""Figures of generations: avg@k, pass@k, intervals, parallelism and speed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from rl.evaluation.generations import BatchCost, Generation
from rl.track.intervals import bootstrap_interval, pass_at_k, wilson_interval


@dataclass
class Figures:
    """The figures of one decoder. A completion is right when its reward is at least 1.

    Attributes:
        samples: k, completions per problem.
        avg: mean over problems of the share of right samples; `avg@k` for k samples.
        low, high: its 95 % interval, of the kind `interval`: "wilson" for one sample per problem (or where all
            problems agree and a bootstrap would see no spread), else "bootstrap" over problems.
        pass_at: k -> unbiased pass@k and its interval, over the problems with at least k scored samples.
        mean_reward: over all scored completions.
        num_problems: problems with a scored sample; only they count.
        unscored: completions without a score; they count nowhere.
        reasons: why, and how often.
        tokens_per_forward: answer tokens (up to the end token) per denoising forward of their own sequence.
        tokens_per_second: answer tokens per second of sampling, None when no time was recorded.
        ended: share of completions that reached the end token.
        metrics: mean of everything that the judge reported beside its score, over the completions that have it.
    """

    samples: int
    avg: float
    low: float
    high: float
    interval: str
    pass_at: dict[int, tuple[float, float, float]]
    mean_reward: float
    num_problems: int
    num_completions: int
    unscored: int
    tokens_per_forward: float
    tokens_per_second: float | None
    ended: float
    reasons: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Everything, with NaN as null: JSON has no NaN."""
        return {name: _without_nan(value) for name, value in asdict(self).items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def figures(generations: Sequence[Generation], batches: Sequence[BatchCost], ks: Sequence[int] = ()) -> Figures:
    """The figures of one decoder's generations.

    Args:
        ks: numbers of samples to give pass@k for; powers of two and the number of samples when empty.
    """
    samples = 1 + max((generation.sample for generation in generations), default=0)
    problems: dict[str, list[bool]] = {}
    rewards = []
    for generation in generations:
        right = problems.setdefault(generation.prompt_id, [])
        if generation.reward is not None:
            right.append(generation.reward >= 1.0)
            rewards.append(generation.reward)
    scored = [right for right in problems.values() if right]
    shares = [fmean(right) for right in scored]
    avg, low, high, kind = _mean(shares, single=max(map(len, scored), default=1) == 1)
    pass_at = {}
    for k in [k for k in ks if k <= samples] or default_ks(samples):
        values = [pass_at_k(len(right), sum(right), k) for right in scored if len(right) >= k]
        pass_at[k] = _mean(values, single=k == 1 and all(len(right) == 1 for right in scored))[:3]
    tokens = sum(len(generation.completion_ids) for generation in generations)
    forwards = sum(generation.steps for generation in generations)
    seconds = sum(batch.seconds for batch in batches)
    return Figures(
        samples=samples,
        avg=avg,
        low=low,
        high=high,
        interval=kind,
        pass_at=pass_at,
        mean_reward=fmean(rewards) if rewards else float("nan"),
        num_problems=len(scored),
        num_completions=len(generations),
        unscored=len(generations) - len(rewards),
        tokens_per_forward=tokens / max(forwards, 1),
        tokens_per_second=sum(batch.tokens for batch in batches) / seconds if seconds else None,
        ended=fmean(generation.ended for generation in generations) if generations else float("nan"),
        reasons=dict(Counter(str(g.reason) for g in generations if g.reward is None).most_common()),
        metrics=_means([generation.metrics for generation in generations]),
    )


def _means(reported: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Name -> mean over those that have it."""
    names = dict.fromkeys(name for one in reported for name in one)
    return {name: fmean(one[name] for one in reported if name in one) for name in names}


def _mean(values: Sequence[float], single: bool) -> tuple[float, float, float, str]:
    if not values:
        return float("nan"), 0.0, 1.0, "none"
    mean = fmean(values)
    if single or set(values) in ({0.0}, {1.0}):
        low, high = wilson_interval(round(sum(values)), len(values))
        return mean, low, high, "wilson"
    return mean, *bootstrap_interval(values), "bootstrap"


def default_ks(samples: int) -> list[int]:
    """1, 2, 4, ... up to the number of samples, and that number itself."""
    return sorted({2**power for power in range(samples.bit_length()) if 2**power <= samples} | {samples})


def table(results: Mapping[str, Figures]) -> list[str]:
    """One line per decoder under a heading, and one for every reason a score is missing."""
    ks = sorted({k for figure in results.values() for k in figure.pass_at if k > 1})
    head = ["decoder@steps", "k", "avg@k", "95 % interval", *(f"pass@{k}" for k in ks)]
    lines = [[*head, "problems", "unscored", "ended", "tokens/forward", "tokens/s"]]
    for name, figure in results.items():
        cells = [name, str(figure.samples), f"{figure.avg:.3f}", f"[{figure.low:.3f}, {figure.high:.3f}]"]
        cells += [f"{figure.pass_at[k][0]:.3f}" if k in figure.pass_at else "-" for k in ks]
        cells += [str(figure.num_problems), f"{figure.unscored}/{figure.num_completions}", f"{figure.ended:.0%}"]
        speed = "-" if figure.tokens_per_second is None else f"{figure.tokens_per_second:,.0f}"
        lines.append([*cells, f"{figure.tokens_per_forward:.2f}", speed])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    for name, figure in results.items():
        text += [f"unscored, {name}: {count}x {reason}" for reason, count in figure.reasons.items()]
    return text
