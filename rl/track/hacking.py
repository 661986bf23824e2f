"""The hacking panel of a report: every reward, the held-out judge, diversity and saturation over training.

A reward is hacked where it goes on rising while a judge that nothing was trained on falls. The step at which the two
part is marked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from rl.track.intervals import difference_interval
from rl.track.jsonl import read_metrics
from rl.track.plots import (
    LIGHT,
    REWARD,
    Series,
    Theme,
    accuracy_names,
    draw_ends,
    draw_heldout,
    draw_line,
    draw_smoothed,
    heldout_title,
    last_row,
    new_figure,
    same_steps,
    save_figure,
    series,
    set_title,
    smoothed,
    styles_of,
    window_of,
)
from rl.track.verdict import read_summary

SATURATION = "reward/zero_variance_share"
_PART = re.compile(r"reward/([^/@]+)/mean$")
_FEWEST = 5  # training steps of which a mean has an interval


@dataclass(frozen=True)
class Parting:
    """Where judge and reward part.

    Attributes:
        step: RL step of the judge's best evaluation.
        judge, reward: (there, at the end).
    """

    step: int
    judge: tuple[float, float]
    reward: tuple[float, float]


def parting(train: Sequence[Mapping[str, Any]], evals: Sequence[Mapping[str, Any]], last: int | None) -> Parting | None:
    """The step from which the reward rose and the judge fell, None where that cannot be told from noise.

    The last evaluation on the way is compared with the best before it, and where that shows nothing, the one after
    training with the one before (they are about other problems). The judge fell when the interval of the difference
    lies below 0, at a level of 5 % over all the evaluations that might have been the best one. The reward rose when its
    running mean did, by more than the two means' half-widths together (root of the sum of squares).

    Args:
        train, evals: lines of metrics.jsonl.
        last: RL step of the evaluation after training, None in a run that goes on.
    """
    names = accuracy_names(evals)
    rewards = series(train, REWARD)
    if not names or len(rewards.values) < _FEWEST:
        return None
    means, half = smoothed(rewards.values, window_of(len(rewards.values)))
    for ends in (False, True):
        judged = series([record for record in evals if (record["step"] in (0, last)) == ends], names[-1])
        best = _fell(judged)
        if best is None:
            continue
        step = judged.steps[best]
        there = max((i for i, at in enumerate(rewards.steps) if at <= step), default=0)
        if means[-1] - means[there] > (half[-1] ** 2 + half[there] ** 2) ** 0.5:
            return Parting(step, (judged.values[best], judged.values[-1]), (means[there], means[-1]))
    return None


def _fell(judged: Series) -> int | None:
    """Index of the best evaluation, where the last one is worse beyond chance."""
    if judged.low is None or judged.high is None or len(judged.values) < 2:
        return None
    # Of n evaluations that might be the best one by chance each has an n-th of the 5 %.
    wider = NormalDist().inv_cdf(1 - 0.025 / (len(judged.values) - 1)) / NormalDist().inv_cdf(0.975)
    best = max(range(len(judged.values) - 1), key=lambda index: judged.values[index])

    def wide(i: int) -> tuple[float, float]:
        assert judged.low is not None and judged.high is not None
        value = judged.values[i]
        return value - wider * (value - judged.low[i]), value + wider * (judged.high[i] - value)

    change = difference_interval(judged.values[best], wide(best), judged.values[-1], wide(-1))
    return best if change[1] < 0 else None


def reward_parts(train: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the rewards that were logged one by one, those with weight 0 too."""
    return list(dict.fromkeys(m[1] for record in train for name in record if (m := _PART.match(name))))


def has_panel(summary: Mapping[str, Any], train: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there is something to set beside the reward: a judge of its own, or several rewards."""
    return bool(train) and (summary.get("judge") != summary.get("reward") or len(reward_parts(train)) > 1)


def parting_line(run_dir: str | os.PathLike[str]) -> str:
    """What the panel says, in words."""
    train, evals, last = _read(run_dir)
    found = parting(train, evals, last)
    if found is not None:
        then, now = found.judge
        return (
            f"The judge and the reward part at RL step {found.step}: from there to the end the judge fell from "
            f"{then:.3f} to {now:.3f}, and the reward rose from {found.reward[0]:.3g} to {found.reward[1]:.3g}. What "
            "was learned after that step is no better for the judge: take an earlier checkpoint, hold the policy with "
            "algorithm.kl_to=reference, or change the reward."
        )
    names = accuracy_names(evals)
    count = sum(names[-1] in record for record in evals) if names else 0
    if count < 2 or len(series(train, REWARD).values) < _FEWEST:
        return "Too few evaluations or RL steps to tell whether judge and reward part: set eval.every."
    return f"In {count} evaluations the judge did not fall, beyond chance, while the reward rose."


def plot_hacking(
    run_dir: str | os.PathLike[str], out: str | os.PathLike[str], theme: Theme = LIGHT, narrow: bool = False
) -> Path:
    """Draw the panel of one run; a dashed line marks the step where judge and reward part.

    Args:
        narrow: one panel below the other, for a telephone.

    Returns:
        The path of the PNG.
    """
    train, evals, last = _read(run_dir)
    names, parts = accuracy_names(evals), reward_parts(train)
    rewards = {"Reward trained on": REWARD}
    if len(parts) > 1:
        rewards |= {f"Reward {name}": f"reward/{name}/mean" for name in parts}
    steps = names[-1].rpartition("@")[2] if names else ""
    judged = {f"Judge: {heldout_title(names[-1])[0].lower()}{heldout_title(names[-1])[1:]}": names[-1]} if names else {}
    spread = {"Diversity: Vendi score of a prompt's images": f"eval/vendi@{steps}"}
    judged |= {title: name for title, name in spread.items() if any(name in record for record in evals)}
    titles = [*rewards, *judged, "Saturation: share of groups with equal rewards"]
    columns = 1 if narrow else 2
    cells = [*titles, *["."] * (-len(titles) % columns)]
    panels = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    size = (4.4, 2.4 * len(panels)) if narrow else (11.0, 2.6 * len(panels))
    figure, axes = new_figure(panels, size, [1.0] * len(panels), theme)
    found = parting(train, evals, last)
    styles = iter(styles_of([""] * len(titles), theme))
    for title in titles:
        panel, style = axes[title], next(styles)
        set_title(panel, title)
        if title in rewards:
            end = draw_smoothed(panel, series(train, rewards[title]), style)
        elif title in judged:
            end = draw_heldout(panel, evals, judged[title], last, style)
        else:
            panel.set_ylim(-0.03, 1.03)
            end = draw_line(panel, series(train, SATURATION), style)
        draw_ends(panel, [end], theme)
        if found is not None:
            panel.axvline(found.step, color=theme.ink, linestyle="--", linewidth=1)
    same_steps(axes.values(), [*train, *evals])
    last_row(*(axes[title] for title in panels[-1] if title != "."))
    return save_figure(figure, Path(out))


def _read(run_dir: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int | None]:
    """Train lines, eval lines, and the RL step of the evaluation after training."""
    return read_metrics(run_dir, "train"), read_metrics(run_dir, "eval"), read_summary(run_dir).get("train_steps")
